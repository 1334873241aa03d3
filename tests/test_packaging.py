"""What is installed is what was written: the wheel, the links, the import rules that no linter sees."""

from __future__ import annotations

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kernel", "drivers", "plugins", "shell")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git knows (and the new ones it would), so nothing lying about gets in or helps."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if not (ROOT / name).exists():
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


def modules() -> set[str]:
    files = {f"llm_os/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    facade = [*(ROOT / "llm_os").glob("*.py"), *(ROOT / "llm_os" / "testing").rglob("*.py")]
    return files | {str(path.relative_to(ROOT)) for path in facade}


def test_the_wheel_holds_every_module_once_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if name.endswith(".py")} == modules()
    assert "llm_os/py.typed" in names and "llm_os/drivers/store/aliases.json" in names


def test_the_installed_wheel_imports_from_itself(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import llm_os, llm_os.kernel.core as core; "
        "import llm_os.drivers.sim, llm_os.shell.cli; print(llm_os.__file__); print(core.__file__)"
    )
    where = run(sys.executable, "-c", code, cwd=tmp_path).split()
    assert all(path.startswith(str(tmp_path / "site")) for path in where)


def test_every_package_folder_is_named_in_pyproject() -> None:
    named = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert named == {"llm_os", "llm_os.testing"} | {"llm_os." + ".".join(folder.parts) for folder in folders}


@pytest.mark.parametrize("code", ["import llm_os", "import llm_os; llm_os.Kernel, llm_os.Request, llm_os.Store"])
def test_importing_the_facade_does_not_import_heavy_libraries(code: str) -> None:
    heavy = ("torch", "numpy", "tokenizers", "huggingface_hub", "safetensors", "jinja2")
    print_loaded = f"{code}; import sys; print([name for name in {heavy!r} if name in sys.modules])"
    assert run(sys.executable, "-c", print_loaded).strip() == "[]"


def test_every_public_name_can_be_imported_and_a_wrong_one_is_an_attribute_error() -> None:
    import llm_os

    assert all(getattr(llm_os, name) is not None for name in llm_os.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Kernle'"):
        llm_os.Kernle  # noqa: B018


def test_versions_agree() -> None:
    import llm_os

    assert importlib.metadata.version("llm-os-runtime") == llm_os.__version__


def test_the_kernel_imports_only_the_standard_library_and_three_packages() -> None:
    """An allow-list, which import-linter has no form for."""
    allowed = {"llm_os.kernel", "msgspec", "anyio", "pluggy"} | sys.stdlib_module_names
    for path in (ROOT / "kernel").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names):
                    modules = [alias.name for alias in names]
                case ast.ImportFrom(module=str(module), level=0):
                    modules = [module]
                case _:
                    continue
            for module in modules:
                package = ".".join(module.split(".")[: 2 if module.startswith("llm_os.") else 1])
                assert package in allowed, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("package", ["torchvision", "triton"])
def test_packages_that_break_the_environment_are_absent(package: str) -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(package)
