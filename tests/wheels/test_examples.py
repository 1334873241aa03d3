"""What the docs tell a stranger to write builds, installs, passes its own tests, and changes nobody's answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llm_os

EXAMPLES = ("my-dice", "shortest", "tiny")


def answers(**config: object) -> list[tuple[int, ...]]:
    """Of a kernel with several requests at once, of two models and two tenants."""
    with llm_os.Kernel(llm_os.Config(**{"driver": "sim", "memory": "64MiB", **config})) as kernel:
        streams = [
            kernel.stream(
                llm_os.Request(
                    model=f"sim:{'ab'[number % 2]}",
                    prompt="hello " * number,
                    tenant="xy"[number // 2 % 2],
                    sampling=llm_os.Sampling(max_tokens=20, seed=number, temperature=number % 2),
                )
            )
            for number in range(1, 7)
        ]
        return [tuple(stream.result().token_ids) for stream in streams]


def test_the_docs_have_these_examples_each_under_70_lines(examples: dict[str, dict[str, str]]) -> None:
    assert set(examples) == set(EXAMPLES)
    for name, files in examples.items():
        assert any(path.endswith("llm_os.toml") for path in files) and any(path.startswith("tests/") for path in files)
        lines = sum(text.count("\n") for path, text in files.items() if not path.startswith("tests/"))
        assert lines < 70, f"{name} has {lines} lines"


def test_packages_that_are_begun_or_documented_pass_their_tests(
    packages: dict[str, Path], site: Path, tmp_path: Path
) -> None:
    """All in one run, in an environment where they are installed."""
    folders = [packages[name] / "tests" for name in ("just-begun", *EXAMPLES)]
    options = ("-q", "-rA", "-W", "error", "-p", "llm_os.testing.plugin", "--import-mode=importlib")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", *folders],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.findall(r"^PASSED \S*?::(Test\w+)::", done.stdout, re.MULTILINE)
    assert set(passed) == {"TestContract", "TestThrowDice", "TestShortest", "TestTiny"}
    assert passed.count("TestTiny") >= 20, "the whole suite for drivers"


def test_installed_plugins_change_no_answers_and_nor_do_those_that_are_enabled(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_them = answers()
    enabled = answers(plugins=("my_dice", "shortest", "tiny"))
    monkeypatch.undo()
    assert "tiny" not in {manifest.name for manifest in llm_os.installed_plugins()}
    assert answers() == with_them == enabled


@pytest.mark.usefixtures("installed")
def test_the_example_of_a_driver_answers_the_same_in_company_and_alone() -> None:
    config = {"driver": "tiny", "plugins": ("tiny",)}
    assert answers(**config) == answers(**config, batch_size=1)
    assert answers(**config) != answers()
    assert "tiny" in {info.driver for info in llm_os.probe(llm_os.Config(plugins=("tiny",)))}


@pytest.mark.usefixtures("installed")
def test_the_example_of_a_policy_decides_who_is_first_and_not_what_is_said() -> None:
    assert answers(plugins=("shortest",), policy="shortest", batch_size=1) == answers()


@pytest.mark.usefixtures("installed")
def test_the_example_of_a_tool_is_offered_with_its_options() -> None:
    config = llm_os.Config(driver="sim", memory="64MiB", plugins=("my_dice",), options={"my_dice": {"sides": 2}})
    with llm_os.Kernel(config) as kernel:
        (tool,) = [tool for tool in kernel.tools if tool.name == "throw_dice"]
    assert set(tool.call({"count": 100})) == {1, 2}


Command = Callable[..., subprocess.CompletedProcess[str]]


def test_a_plugin_is_found_enabled_used_and_disabled_at_the_shell(llm_os_command: Command) -> None:
    listed = json.loads(llm_os_command("plugins", "list", "--json").stdout)
    (row,) = [row for row in listed["plugins"] if row["name"] == "my_dice"]
    assert (row["enabled"], row["version"], row["distribution"]) == (False, "0.1.0", "my-dice")
    refused = llm_os_command("dice", "3")
    assert refused.returncode == 2 and "dice" in refused.stderr
    asked = llm_os_command("plugins", "enable", "my_dice")
    assert asked.returncode == 2 and "no sandbox" in asked.stderr and "register_tools" in asked.stderr
    assert llm_os_command("plugins", "enable", "my_dice", "--yes").returncode == 0
    thrown = llm_os_command("dice", "3", "--sides", "1")
    assert (thrown.returncode, thrown.stdout, thrown.stderr) == (0, "1 1 1\n", "")
    assert " dice " in llm_os_command("--help").stdout
    assert llm_os_command("plugins", "disable", "my_dice").returncode == 0
    assert llm_os_command("dice").returncode == 2


def test_a_driver_of_a_plugin_answers_at_the_shell(llm_os_command: Command) -> None:
    llm_os_command("plugins", "enable", "tiny", "--yes")
    options = ("--driver", "tiny", "--memory", "64MiB", "--max-tokens", "8")
    done = llm_os_command("run", "sim:a", "Hello", *options)
    assert done.returncode == 0 and re.fullmatch(r"[a-z]{8}\n", done.stdout), done.stderr
    report = json.loads(llm_os_command("doctor", "--json").stdout)
    assert "tiny" in {driver["driver"] for driver in report["drivers"]} and "tiny" in report["plugins"]
