"""Plugins as strangers write them: examples of the docs and a package that misbehaves, built as wheels and installed
into a scratch folder, with a real pip and no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
_FILE = re.compile(r"^`([\w-]+)/([\w./-]+)`[^\n]*\n\n```(?:toml|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLM_OS_", "PYTEST", "PYTHON"))}
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=False)


def _succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def examples() -> dict[str, dict[str, str]]:
    """distribution -> path in its folder -> contents, as the docs have them."""
    found: dict[str, dict[str, str]] = {}
    for page in ("write-a-plugin.md", "write-a-driver.md"):
        for folder, path, text in _FILE.findall((ROOT / "docs" / page).read_text()):
            found.setdefault(folder, {})[path] = text
    return found


@pytest.fixture(scope="session")
def packages(examples: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of source: each example begun with `llm-os plugins new`, as its page says, one that is only begun, and
    the one that misbehaves."""
    folder = tmp_path_factory.mktemp("packages")
    packages = {}
    for name in ("just-begun", *examples):
        code = "import sys; from llm_os.__main__ import main; sys.exit(main())"
        made = run(sys.executable, "-c", code, "plugins", "new", name, "--into", folder)
        packages[name] = Path(_succeeded(made).strip())
        for path, text in examples.get(name, {}).items():
            assert (packages[name] / path).exists(), "the page changes files that are there"
            (packages[name] / path).write_text(text)
    packages["misbehaves"] = folder / "misbehaves"
    shutil.copytree(ROOT / "tests" / "data" / "misbehaves", packages["misbehaves"])
    return packages


@pytest.fixture(scope="session")
def site(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of them installed from wheels."""
    folder = tmp_path_factory.mktemp("scratch")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-index")
    _succeeded(run(*pip, "wheel", *offline, "--no-build-isolation", "-w", folder / "wheels", *packages.values()))
    wheels = sorted((folder / "wheels").glob("*.whl"))
    assert len(wheels) == len(packages)
    _succeeded(run(*pip, "install", *offline, "--target", folder / "site", *wheels))
    return folder / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """They are installed here, in this process, until the end of the test."""
    monkeypatch.syspath_prepend(str(site))
    return site


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def llm_os_command(site: Path, tmp_path: Path) -> Command:
    """`llm_os_command("plugins", "list")`: the command line of a user who has installed them."""

    def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        home = {"LLM_OS_HOME": str(tmp_path / "home"), "XDG_CONFIG_HOME": str(tmp_path / "config")}
        return run(sys.executable, "-m", "llm_os", *arguments, PYTHONPATH=str(site), **home, **environment)

    return command
