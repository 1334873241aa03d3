"""The docs say what the code does: hooks, fields, links and examples."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llm_os
import llm_os.testing
from llm_os.kernel import hookspecs
from llm_os.shell import cli
from llm_os.testing import plugin

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_every_hook_stands_in_the_docs_with_its_signature() -> None:
    page = (ROOT / "docs" / "hooks.md").read_text()
    hooks = {n: f for n, f in vars(hookspecs).items() if inspect.isfunction(f) and hasattr(f, "llm_os_spec")}
    assert hooks
    for name, function in hooks.items():
        signature = str(inspect.signature(function)).replace("'", "")
        assert f"## `{name}{signature}`" in page


def test_every_config_field_stands_in_the_docs_with_its_default() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    for name, default in zip(llm_os.Config.__struct_fields__, llm_os.Config.__struct_defaults__, strict=True):
        shown = "{}" if name in ("tenants", "options") else f'"{default}"' if isinstance(default, str) else str(default)
        assert re.search(rf"^\| `{name}: [^`]+` \| `{re.escape(shown)}` \|", page, re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    rooms = re.findall(r"`((?:kernel|drivers|plugins|shell|tests|docs)/[\w./-]+)`", text)
    assert [room for room in rooms if not (ROOT / room).exists()] == []


def test_the_example_in_the_readme_runs(smollm2: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    code = blocks[0].replace("smollm2:135m", str(smollm2))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(done.stdout) > 5, done.stderr
    assert done.stderr == ""


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs" / "decisions").glob("*.md"))
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_command_stands_in_the_readme() -> None:
    page = (ROOT / "README.md").read_text()
    assert [name for name in cli.app if not name.startswith("-") and f"llm-os {name} " not in page] == []


def test_every_suite_and_fixture_for_plugin_authors_stands_in_the_docs() -> None:
    page = (ROOT / "docs" / "write-a-plugin.md").read_text()
    fixtures = [name for name in vars(plugin) if name.startswith("llm_os_")]
    suites = [name for name in llm_os.testing.__all__ if name.endswith("Conformance")]
    assert len(fixtures) >= 2 and len(suites) >= 6
    assert [name for name in (*fixtures, *suites) if f"`{name}" not in page] == []
