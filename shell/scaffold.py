"""A plugin to begin with: the files of `llm-os plugins new`. Knows names and text; installs nothing."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from pathlib import Path

import llm_os

_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")

_FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "0.1.0"
description = "A plugin for llm-os."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["llm-os-runtime"]

[project.entry-points.llm_os]
{module} = "{module}.plugin"

[tool.setuptools]
packages = ["{module}"]

[tool.setuptools.package-data]
{module} = ["llm_os.toml"]

[tool.pytest.ini_options]
addopts = ["-p", "llm_os.testing.plugin", "--import-mode=importlib"]
""",
    "{module}/__init__.py": '"""A plugin for llm-os; the code is in plugin.py."""\n',
    "{module}/llm_os.toml": """\
[{module}]
summary = "answers in capitals"
contract = {contract}
hooks = ["register_filters"]
capabilities = []
""",
    "{module}/plugin.py": '''\
"""Answers in capitals. Replace the filter by what you need: docs/hooks.md of llm-os lists what a plugin may do."""

from __future__ import annotations

from llm_os import Config, RegisterFilter, Request, TextFilter, hookimpl


class Capitals:
    """One answer on its way to the reader."""

    def push(self, text: str) -> str:
        return text.upper()

    def flush(self) -> str:
        return ""


class Shout:
    """Every answer goes through Capitals; requests stay as they are."""

    def open(self, request: Request) -> tuple[Request, TextFilter | None]:
        return request, Capitals()


@hookimpl
def register_filters(register: RegisterFilter, config: Config) -> None:
    register("{module}", Shout())
''',
    "tests/test_plugin.py": '''\
"""The filter keeps its contract, and does its work in a kernel on the `sim` driver."""

from __future__ import annotations

import llm_os
import llm_os.testing

from {module}.plugin import Shout


class TestContract(llm_os.testing.FilterConformance):
    def make(self) -> llm_os.Filter:
        return Shout()


def test_answers_come_in_capitals(llm_os_kernel):
    request = llm_os.Request(model="sim:a", prompt="hello", sampling=llm_os.Sampling(max_tokens=16, seed=1))
    plain = llm_os_kernel().stream(request).result().text
    shouted = llm_os_kernel(plugins=("{module}",)).stream(request).result().text
    assert shouted == plain.upper() != plain
''',
    "README.md": """\
# {name}

A plugin for llm-os: answers in capitals.

    pip install -e . pytest hypothesis
    pytest
    llm-os plugins enable {module}
    llm-os run smollm2:135m "Hello"

`{module}/llm_os.toml` says what it is, `{module}/plugin.py` does it. A plugin runs in the kernel's process; it is in no
sandbox.
""",
}


def module_of(name: str) -> str:
    """The name of the package to import, and of the plugin."""
    return name.replace("-", "_")


def write(name: str, into: Path, taken: set[str]) -> Path:
    """The folder of the new package. `taken` are the names of plugins that there are. Raises ConfigError, OSError."""
    module = module_of(name)
    if not _NAME.fullmatch(name) or len(name) > 64:
        raise llm_os.ConfigError(f"{name!r} is no name for a plugin; use up to 64 of a-z, 0-9 and -, such as my-plugin")
    if keyword.iskeyword(module) or module in sys.stdlib_module_names | {"llm_os", "tests"}:
        raise llm_os.ConfigError(f"{name!r} is a name of Python's or llm-os's own; choose another")
    if module in taken:
        raise llm_os.ConfigError(f"there is a plugin {module!r} already; choose another name")
    if importlib.util.find_spec(module) is not None:
        raise llm_os.ConfigError(f"there is a package {module!r} installed already; choose another name")
    folder = into / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise llm_os.ConfigError(f"{folder} is there already; choose another name or --into") from None
    for file, text in _FILES.items():
        place = folder / file.format(module=module)
        place.parent.mkdir(exist_ok=True)
        filled = text.replace("{name}", name).replace("{module}", module).replace("{contract}", str(llm_os.CONTRACT))
        place.write_text(filled, "utf-8")
    return folder
