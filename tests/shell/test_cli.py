"""What holds for every command: help, versions, exit codes, one line for each error, and a light start."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import llm_os

HEAVY = ("torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "prompt_toolkit", "jinja2")
LIGHT_ROOMS = ("cli", "extensions", "settings", "signals", "stdio")
COMMANDS = ("run", "chat", "pull", "models", "rm", "doctor", "plugins", "sim", "bench", "completion")


def test_help_names_every_command(run):
    done = run("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for command in COMMANDS:
        assert f" {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(run, command):
    done = run(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: llm-os {command}")


def test_version_is_the_packages(run):
    assert run("--version").stdout == f"{llm_os.__version__}\n"


def imported(environment: dict[str, str], code: str) -> set[str]:
    """The modules that a program imports beside those of every Python, of which the installation here is one."""
    report = f"import sys; before = set(sys.modules)\n{code}\nprint(*set(sys.modules) - before, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def command(*arguments: str) -> str:
    return f"sys.argv = ['llm-os', *{arguments!r}]; from llm_os.__main__ import main; main()"


@pytest.mark.parametrize(
    "arguments", [("--help",), ("run", "--help"), ("bench", "--help"), ("models",), ("--version",)]
)
def test_a_light_command_imports_nothing_heavy(environment, arguments):
    assert imported(environment, command(*arguments)).isdisjoint(HEAVY)


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("completion", "--help")])
def test_who_only_asks_what_there_is_waits_for_no_room_but_the_shell(environment, arguments):
    modules = imported(environment, command(*arguments))
    rooms = {name for name in modules if name.startswith("llm_os.")}
    assert {name.split(".")[1] for name in rooms} == {"__main__", "shell"}
    assert rooms <= {"llm_os.__main__", "llm_os.shell"} | {f"llm_os.shell.{name}" for name in LIGHT_ROOMS}
    assert modules.isdisjoint({*HEAVY, "msgspec", "anyio", "asyncio", "pluggy", "concurrent.futures", "ssl"})


def test_importing_the_package_imports_nothing_but_the_standard_library(environment):
    modules = imported(environment, "import llm_os")
    assert {name.partition(".")[0] for name in modules} <= {"llm_os", *sys.stdlib_module_names}
    assert {name for name in modules if name.startswith("llm_os.")} == set()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_knows_the_commands(run, shell):
    done = run("completion", shell)
    assert done.returncode == 0
    assert "llm-os" in done.stdout and "doctor" in done.stdout and "--temperature" in done.stdout


SIM = ("--driver", "sim", "--memory", "64MiB")
WRONG_LINES = {
    "unknown option": (("run", "sim:a", "hi", "--temprature", "0"), 2, ("--temprature", "--temperature")),
    "unknown command": (("rnu",), 2, ("rnu", "run")),
    "no model": (("run",), 2, ("MODEL",)),
    "too many words": (("run", "sim:a", "two", "words"), 2, ("words", "quotes")),
    "a prompt like an option": (("run", "sim:a", "- a list"), 2, ("--",)),
    "option without its value": (("run", "sim:a", "hi", "--max-tokens"), 2, ("--max-tokens",)),
    "max_tokens 0": (("run", "sim:a", "hi", "--max-tokens", "0"), 2, ("max_tokens is 0", "1")),
    "max_tokens negative": (("run", "sim:a", "hi", "--max-tokens", "-1"), 2, ("max_tokens is -1", "1")),
    "max_tokens text": (("run", "sim:a", "hi", "--max-tokens", "many"), 2, ("--max-tokens", "many")),
    "max_tokens beyond 32 bits": (("run", "sim:a", "hi", "--max-tokens", "9" * 30), 2, ("max_tokens", "2147483647")),
    "max_tokens beyond the context": (("run", "sim:a", "hi", "--max-tokens", "99999", *SIM), 2, ("99999", "4096")),
    "temperature negative": (("run", "sim:a", "hi", "--temperature", "-1"), 2, ("temperature is -1", "0")),
    "temperature nan": (("run", "sim:a", "hi", "--temperature", "nan"), 2, ("temperature is nan",)),
    "empty stop string": (("run", "sim:a", "hi", "--stop", ""), 2, ("stop string", "1 to 1024")),
    "empty prompt": (("run", "sim:a", "", *SIM), 2, ("prompt is empty",)),
    "blank prompt": (("run", "sim:a", " \n", *SIM), 2, ("prompt is empty",)),
    "prompt beyond the context": (("run", "sim:a?context_length=16", "h" * 16, *SIM), 2, ("23 tokens", "16")),
    "system without a template": (("run", "sim:a", "hi", "--raw", "--system", "x", *SIM), 2, ("--system", "--raw")),
    "unknown precision": (("run", "sim:a", "hi", "--precision", "best"), 2, ("best", "exact", "fast")),
    "unknown driver": (("run", "sim:a", "hi", "--driver", "tpu"), 2, ("'tpu'", "cpu", "cuda")),
    "memory that is no size": (("run", "sim:a", "hi", "--memory", "lots"), 2, ("memory is 'lots'", "2GiB")),
    "memory below a frame": (("run", "sim:a", "hi", "--memory", "1"), 2, ("memory is '1'", "2097152")),
    "memory below the model": (("run", "sim:a", "hi", "--driver", "sim", "--memory", "4MiB"), 1, ("raise memory",)),
    "threads 0": (("run", "sim:a", "hi", "--threads", "0"), 2, ("threads is 0",)),
    "unknown model": (("run", "smolm2:135m", "hi", *SIM), 1, ("'smolm2:135m'", "smollm2:135m")),
    "model that is no name": (("run", "", "hi", *SIM), 1, ("''",)),
    "malformed hub model": (("run", "hf:nobody", "hi", *SIM), 1, ("hf:org/repo",)),
    "malformed wheel": (("pull", "pip:thing"), 1, ("pip:dist==version/path",)),
    "pull of an unknown model": (("pull", "nothing:here"), 1, ("'nothing:here'",)),
    "chat with an unknown model": (("chat", "nothing:here", *SIM), 1, ("'nothing:here'",)),
    "rm of nothing": (("rm",), 2, ("llm-os models",)),
    "rm of an unknown model": (("rm", "nothing:here"), 1, ("'nothing:here'", "llm-os models")),
    "unknown shell": (("completion", "dos"), 2, ("dos", "bash")),
}


@pytest.mark.parametrize("case", WRONG_LINES)
def test_a_wrong_command_line_gets_one_line_that_names_it(run, case):
    arguments, code, named = WRONG_LINES[case]
    done = run(*arguments)
    assert_one_line(done, code, *named)


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, *named: str) -> None:
    assert done.stdout == ""
    assert done.stderr.startswith("llm-os: ") and done.stderr.count("\n") == 1, done.stderr
    assert "bug" not in done.stderr
    for text in named:
        assert text in done.stderr
    assert done.returncode == code


def bad_models(folder: Path, model: Path) -> dict[str, Path]:
    with model.open("rb") as file:
        header = file.read(1 << 20)
    files = {
        "text.gguf": b"This is no model.\n" * 100,
        "empty.gguf": b"",
        "magic.gguf": header[:4],
        "truncated.gguf": header[:5000],
        "no_tensors.gguf": header,
        "huge_count.gguf": header[:8] + (2**63 - 1).to_bytes(8, "little") + header[16:],
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    pickled = folder / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (pickled / "model.safetensors").write_bytes(pickle.dumps({"weight": [0.0] * 1000}))
    (folder / "nothing").mkdir()
    return {name: folder / name for name in (*files, "pickled", "nothing", "missing.gguf")}


def test_a_file_that_is_no_model_gets_one_line_that_names_it(run, tmp_path, smollm2):
    for name, path in bad_models(tmp_path, smollm2).items():
        done = run("run", str(path), "hi", *SIM)
        assert_one_line(done, 1, name)


def test_a_file_that_is_no_model_is_refused_at_a_device_as_well(run, tmp_path, smollm2):
    path = bad_models(tmp_path, smollm2)["no_tensors.gguf"]
    assert_one_line(run("run", str(path), "hi", "--driver", "cpu"), 1, "no_tensors.gguf")


def test_an_error_shows_its_traceback_to_who_asks_for_it(run):
    done = run("run", "sim:a", "hi", "--max-tokens", "0", LLM_OS_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_errors_fit_a_terminal_of_another_encoding(run):
    done = run("run", "modèle-😀", "hi", *SIM, PYTHONIOENCODING="ascii")
    assert_one_line(done, 1, "mod?le")


def test_a_name_cannot_steer_the_terminal(run):
    done = run("run", "\x1b]0;owned\x07", "hi", *SIM)
    assert "\x1b" not in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("command", ["redact", "mcp", "quantize"])
def test_a_command_of_a_plugin_that_is_off_says_which(run, command):
    done = run(command, "x")
    assert done.returncode == 2
    assert done.stderr == f"llm-os: {command} comes with a plugin that is off; llm-os plugins enable {command}\n"
