"""A plugin that raises, hangs or lies wherever it is asked: who asked it is told so, everybody else gets the answer
that there would have been without it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import llm_os
from llm_os.kernel import plugins as kernel_plugins

HOW = ("raise", "hang", "lie")
PATIENCE_S = {"hang": 0.5}  # how long a call may take, where one does not come back


@pytest.fixture
def misbehaves(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The package, installed; what hangs in it comes back at the end of the test."""
    monkeypatch.syspath_prepend(str(site))
    module = importlib.import_module("misbehaves")
    module.released.clear()
    yield module
    module.released.set()
    module.where = module.how = ""


Config = Callable[..., llm_os.Config]


@pytest.fixture
def bad(misbehaves: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Config:
    """`bad("admit", "raise")`: the configuration of a kernel with a plugin that is bad there in that way."""

    def bad(where: str, how: str, **fields: Any) -> llm_os.Config:
        misbehaves.where, misbehaves.how = where, how
        limit = fields.get("hook_limit_s", PATIENCE_S.get(how, 30.0))
        monkeypatch.setattr(kernel_plugins, "FILES_LIMIT_S", 2 * limit)
        return config(**{"plugins": ("misbehaves",), "hook_limit_s": limit, **fields})

    return bad


def config(**fields: Any) -> llm_os.Config:
    return llm_os.Config(**{"driver": "sim", "memory": "64MiB", **fields})


def request(number: int, **fields: Any) -> llm_os.Request:
    sampling = {"max_tokens": 8, "seed": number, "temperature": number % 2, **fields.pop("sampling", {})}
    fields = {"model": f"sim:{'ab'[number % 2]}", "prompt": "hello " * number, **fields}
    return llm_os.Request(sampling=llm_os.Sampling(**sampling), **fields)


def answers(kernel: llm_os.Kernel) -> list[tuple[int, ...]]:
    """Of innocent requests, all at once."""
    streams = [kernel.stream(request(number)) for number in range(1, 5)]
    return [tuple(stream.result().token_ids) for stream in streams]


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    """Without any plugin."""
    with llm_os.Kernel(config()) as kernel:
        return answers(kernel)


def matrix(*places: str) -> Any:
    return pytest.mark.parametrize(("where", "how"), [(where, how) for where in places for how in HOW])


# -- while requests run ------------------------------------------------------------------------------------------------

VICTIMS: dict[str, dict[str, Any]] = {
    "compile_grammar": {"sampling": {"grammar": llm_os.Grammar(kind="regex", source="a+")}},
    "Pass": {"model": "sim:a+misbehaves"},
    "open_image": {"model": "sim:victim"},
}


@matrix("admit", "Filter.open", "TextFilter.push", "TextFilter.flush", "compile_grammar", "Pass", "open_image")
def test_the_request_that_it_was_for_fails_by_name_and_no_other(
    bad: Config, expected: list[tuple[int, ...]], where: str, how: str
) -> None:
    victim = {"tenant": "victim", **VICTIMS.get(where, {})}
    with llm_os.Kernel(bad(where, how)) as kernel:
        for _ in range(2):
            failing = kernel.stream(request(9, **victim))
            assert answers(kernel) == expected
            with pytest.raises(llm_os.Error) as caught:
                failing.result()
            assert "misbehaves" in str(caught.value) and "\n" not in str(caught.value)
        assert kernel.ps() == []


@pytest.mark.parametrize("where", ["open_image", "Pass"])
def test_nobody_waits_for_models_that_hang_while_they_are_opened(
    bad: Config, misbehaves: ModuleType, expected: list[tuple[int, ...]], where: str
) -> None:
    with llm_os.Kernel(bad(where, "hang", hook_limit_s=30.0)) as kernel:
        names = [f"{VICTIMS[where]['model']}{'+misbehaves' * number}" for number in range(3)]
        failing = [kernel.stream(request(9, model=name)) for name in names]
        assert answers(kernel) == expected
        assert {stream.pid for stream in failing} <= {process.pid for process in kernel.ps()}, "they still wait"
        misbehaves.how = "raise"
        misbehaves.released.set()
        for stream in failing:
            with pytest.raises(llm_os.Error, match="misbehaves"):
                stream.result()


@matrix("booted", "step_finished", "process_exited", "halting")
def test_events_that_it_cannot_take_change_nothing(
    bad: Config, expected: list[tuple[int, ...]], where: str, how: str
) -> None:
    with llm_os.Kernel(bad(where, how)) as kernel:
        assert answers(kernel) == expected
        assert answers(kernel) == expected


@matrix("Policy.share", "Policy.rank")
def test_a_policy_that_fails_gives_way_to_the_fair_one(
    bad: Config, expected: list[tuple[int, ...]], where: str, how: str
) -> None:
    with llm_os.Kernel(bad(where, how, policy="misbehaves", batch_size=1)) as kernel:
        assert answers(kernel) == expected


@matrix("pick_victim")
def test_a_victim_that_it_cannot_choose_is_chosen_by_the_kernel(
    bad: Config, expected: list[tuple[int, ...]], where: str, how: str
) -> None:
    with llm_os.Kernel(bad(where, how, memory="16MiB", slice_s=0.01)) as kernel:  # one model at a time
        assert answers(kernel) == expected
        assert answers(kernel) == expected


def test_a_plugin_that_always_fails_is_off_and_its_victims_never_pass_it_by(
    bad: Config, expected: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    with llm_os.Kernel(bad("TextFilter.push", "raise")) as kernel:
        for _ in range(3):
            with pytest.raises(llm_os.PluginError, match=r"TextFilter\.push raised RuntimeError: broken on purpose"):
                kernel.stream(request(9, tenant="victim")).result()
        with pytest.raises(llm_os.PluginError, match="'misbehaves' is off: it failed 3 times in a row"):
            kernel.stream(request(9, tenant="victim")).result()
    assert any("is off" in record.getMessage() for record in caplog.records)
    with llm_os.Kernel(config()) as kernel:
        assert answers(kernel) == expected


# -- at boot -----------------------------------------------------------------------------------------------------------


@matrix("register_drivers", "register_policies", "register_filters", "register_passes", "register_tools", "Tool.wrong")
def test_a_kernel_does_not_boot_with_it_and_says_why_in_a_line(
    bad: Config, expected: list[tuple[int, ...]], where: str, how: str
) -> None:
    with pytest.raises(llm_os.ConfigError) as caught:
        llm_os.Kernel(bad(where, how))
    assert "plugin 'misbehaves'" in str(caught.value) and "\n" not in str(caught.value)
    with llm_os.Kernel(config()) as kernel:
        assert answers(kernel) == expected


@pytest.mark.parametrize("how", ["raise", "lie"])
@pytest.mark.parametrize("where", ["Policy.make", "open_log", "open_swap"])
def test_what_it_was_to_open_at_boot_is_missed_in_a_line(bad: Config, tmp_path: Path, where: str, how: str) -> None:
    fields: dict[str, Any] = {
        "Policy.make": {"policy": "misbehaves"},
        "open_log": {"state": tmp_path / "state"},
        "open_swap": {"swap_host": "1MiB"},
    }[where]
    with pytest.raises(llm_os.Error) as caught:
        llm_os.Kernel(bad(where, how, **fields))
    assert "misbehaves" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["raise", "lie"])
def test_a_driver_that_cannot_be_asked_hides_no_other(bad: Config, how: str) -> None:
    probes = {info.driver: info for info in llm_os.probe(bad("Driver.probe", how))}
    assert probes["sim"].unavailable is None
    assert "its probe" in (probes["misbehaves"].unavailable or "")
    with pytest.raises(llm_os.Error, match="misbehaves"):
        llm_os.Kernel(bad("Driver.make", how, driver="misbehaves"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises_at_import", "cannot be imported: RuntimeError: broken on purpose"),
        ("exits_at_import", r"cannot be imported: RuntimeError: SystemExit: 3"),
        ("hangs_at_import", r"cannot be imported: TimeoutError: it took longer than 0\.2 s"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_an_error_like_another(
    misbehaves: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(kernel_plugins, "FILES_LIMIT_S", 0.2)
    with pytest.raises(llm_os.ConfigError, match=f"plugin '{name}' {message}"):
        llm_os.Kernel(config(plugins=(name,)))
    with llm_os.Kernel(config()) as kernel:
        assert kernel.stream(request(1)).result().token_ids


# -- at the shell ------------------------------------------------------------------------------------------------------

Command = Callable[..., Any]
RUN = ("run", "sim:a", "hello", "--driver", "sim", "--memory", "64MiB", "--max-tokens", "4")


def test_what_is_installed_is_not_imported_before_somebody_enables_it(llm_os_command: Command, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    traced = {"MISBEHAVES_TRACE": str(trace)}
    for arguments in (("plugins", "list"), ("plugins", "info", "writes_at_import"), ("--help",), ("nothing",), RUN):
        llm_os_command(*arguments, **traced)
        assert not trace.exists(), arguments
    enabled = llm_os_command("plugins", "enable", "writes_at_import", "--yes", **traced)
    assert enabled.returncode == 0 and not trace.exists()
    llm_os_command("plugins", "list", **traced)
    assert not trace.exists(), "nor before it is needed"
    done = llm_os_command("trace", **traced)
    assert (done.returncode, done.stdout) == (0, "a command of a plugin\n")
    assert trace.read_text() == "imported"


def test_a_command_of_a_plugin_does_not_take_the_place_of_another(llm_os_command: Command) -> None:
    llm_os_command("plugins", "enable", "writes_at_import", "--yes")
    assert "not the real one" not in llm_os_command(*RUN).stdout
    helped = llm_os_command("--help")
    assert helped.returncode == 0 and " trace " in helped.stdout
    assert "plugin 'writes_at_import' has a command 'run', which there is already; left out" in helped.stderr


def test_doctor_says_which_plugin_is_broken_and_shows_the_rest(llm_os_command: Command) -> None:
    llm_os_command("plugins", "enable", "raises_at_import", "--yes")
    done = llm_os_command("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1 and any("'raises_at_import' cannot be imported" in each for each in report["problems"])
    assert "cpu" in {driver["driver"] for driver in report["drivers"]}


@pytest.mark.parametrize("name", ["raises_at_import", "exits_at_import"])
def test_a_broken_plugin_can_be_disabled_and_the_way_is_told(llm_os_command: Command, name: str) -> None:
    llm_os_command("plugins", "enable", name, "--yes")
    failed = llm_os_command(*RUN)
    assert failed.returncode == 2 and len(failed.stderr.splitlines()) == 1
    assert f"plugin '{name}' cannot be imported" in failed.stderr
    assert f"llm-os plugins disable {name}" in failed.stderr
    assert llm_os_command("--help").returncode == 0
    listed = json.loads(llm_os_command("plugins", "list", "--json").stdout)
    assert [row["enabled"] for row in listed["plugins"] if row["name"] == name] == [True]
    assert llm_os_command("plugins", "disable", name).returncode == 0
    assert llm_os_command(*RUN).returncode == 0
