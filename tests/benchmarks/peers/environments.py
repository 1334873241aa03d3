"""An environment of its own for each peer, made on first use and kept, so that none of them is ever a dependency.

They lie under `~/.cache/llm-os/benchmarks` (or `$XDG_CACHE_HOME/...`); a folder is ready when its `ready` file says
what was installed into it, and is made anew when that has changed. Builds run `nice`, their output goes to NAME.log.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[2] / "constraints.txt"
_LIMIT_S = 3600


class Unavailable(Exception):
    """A peer that cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """What is compared. `engine` is its worker's side, `engine_ENGINE.py`."""

    name: str
    engine: str
    requirements: tuple[str, ...] = ()  # none: it runs where this project is installed
    options: tuple[str, ...] = ()  # pip's
    variables: dict[str, str] = field(default_factory=dict)  # for the build
    converts: bool = False  # it cannot read the GGUF: it gets a copy in its own format
    beside: str = ""  # the peer whose environment it shares


OURS = Peer("llm-os", "llm_os")
SPECULATING = Peer("llm-os speculating", "llm_os_speculating")
_LLAMA_CPP = Peer(
    "llama.cpp",
    "llama_cpp",
    ("llama-cpp-python==0.3.36", "numpy"),
    # a wheel that was built for any processor may lie in pip's cache: it lacks AVX512
    ("--no-binary", "llama-cpp-python", "--no-cache-dir"),
    {
        "CMAKE_ARGS": f"-DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS=-include{HERE / 'tile_config.h'}",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
    },
)
_AMX = "amx_int8" in Path("/proc/cpuinfo").read_text()
PEERS = (
    _LLAMA_CPP,
    *([replace(_LLAMA_CPP, name="llama.cpp-no-amx", engine="llama_cpp_no_amx", beside="llama.cpp")] if _AMX else []),
    Peer("openvino", "openvino", ("openvino-genai==2026.4.*", "numpy")),
    Peer("ctranslate2", "ctranslate2", ("ctranslate2==4.8.*", "gguf", "numpy"), converts=True),
)
PLOT = Peer("plot", "", ("matplotlib", "numpy"))


def cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "llm-os" / "benchmarks"


def _folder(peer: Peer) -> Path:
    return cache() / (peer.beside or peer.name)


def python_of(peer: Peer) -> Path:
    """The interpreter of the peer's environment, which is made if it must be. Raises Unavailable."""
    if not peer.requirements:
        return Path(sys.executable)
    folder = _folder(peer)
    recipe = json.dumps([sys.version_info[:2], peer.requirements, peer.options, peer.variables]).replace(str(HERE), "")
    stamp, python = folder / "ready", folder / "bin" / "python"
    if stamp.exists() and stamp.read_text() == recipe:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)], log, {})
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    _run([*install, *peer.options, *peer.requirements], log, peer.variables)
    stamp.write_text(recipe)
    return python


def is_ready(peer: Peer) -> bool:
    return not peer.requirements or (_folder(peer) / "ready").exists()


def model_for(peer: Peer, model: Path, sha256: str) -> Path:
    """The file or folder that the peer reads. Raises Unavailable."""
    if not peer.converts:
        return model
    folder = cache() / "models" / f"{peer.name}-{sha256[:16]}"
    if not folder.exists():
        fresh = folder.with_name(f"{folder.name}.{os.getpid()}")
        script = HERE / f"convert_{peer.engine}.py"
        _run([str(python_of(peer)), str(script), str(model), str(fresh)], cache() / f"{peer.name}.log", {})
        fresh.rename(folder)
    return folder


def _run(command: list[str], log: Path, variables: dict[str, str]) -> None:
    polite = ["nice", "-n", "10"] if shutil.which("nice") else []
    with log.open("a") as output:
        done = subprocess.run(
            [*polite, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | variables,
            timeout=_LIMIT_S,
            check=False,
        )
    if done.returncode:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise Unavailable(f"{last[-1].strip() if last else 'it ended without a word'} (all of it: {log})")
