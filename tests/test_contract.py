"""The contract with plugins: what breaks them is found, what only adds passes, the version before still works."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import llm_os
from llm_os.kernel import hookspecs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def contract() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contract", ROOT / "tests" / "contract.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def there(contract: ModuleType) -> dict[str, Any]:
    described: dict[str, Any] = contract.now()
    return described


def test_nothing_that_was_promised_is_broken() -> None:
    done = subprocess.run([sys.executable, ROOT / "tests/contract.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_that_plugins_meet_is_promised(there: dict[str, Any]) -> None:
    assert set(there["hooks"]) == hookspecs.HOOKS
    assert {"Config", "Driver", "Filter", "Image", "Policy", "Request", "Tool", "hookimpl"} <= set(there["names"])
    assert there["names"]["Began"]["is"] == "struct", "the facade does not export it, but Log.append takes it"
    shown = there["names"]["RegisterPolicy"]["members"]["__call__"]["arguments"]["factory"]["type"]
    assert shown == "Callable[(Config), Policy]", "aliases are seen through"


Edit = Callable[[dict[str, Any]], Any]
OPTIONAL = {"type": "int", "required": False, "how": "positional_or_keyword"}
REQUIRED = {**OPTIONAL, "required": True}


def _members(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda d: d["names"][name]["members"]


ADDS: dict[str, Edit] = {
    "a hook": lambda d: d["hooks"].update(new_hook=copy.deepcopy(d["hooks"]["admit"])),
    "an argument of a hook": lambda d: d["hooks"]["admit"]["arguments"].update(tenant=REQUIRED),
    "a first argument of a hook": lambda d: d["hooks"]["admit"].update(
        arguments={"tenant": REQUIRED, **d["hooks"]["admit"]["arguments"]}
    ),
    "a field with a default": lambda d: d["names"]["Tool"]["fields"].update(new={"type": "int", "required": False}),
    "a default of a field": lambda d: d["names"]["Tool"]["fields"]["description"].update(required=False),
    "an optional argument of a function": lambda d: d["names"]["probe"]["arguments"].update(new=OPTIONAL),
    "an optional argument of register": lambda d: _members("RegisterTool")(d)["__call__"]["arguments"].update(
        new=OPTIONAL
    ),
    "a name": lambda d: d["names"].update(New={"is": "value"}),
    "a method of Kernel": lambda d: _members("Kernel")(d).update(new=_members("Kernel")(d)["close"]),
}
BREAKS: dict[str, tuple[Edit, str]] = {
    "a hook is gone": (lambda d: d["hooks"].pop("admit"), "hook admit is gone"),
    "a hook is renamed": (lambda d: d["hooks"].update(admits=d["hooks"].pop("admit")), "hook admit is gone"),
    "an argument of a hook is gone": (lambda d: d["hooks"]["admit"]["arguments"].pop("request"), "admit.request is"),
    "an argument of a hook is retyped": (
        lambda d: d["hooks"]["admit"]["arguments"]["request"].update(type="dict"),
        "admit.request was Request and is dict",
    ),
    "a hook returns something else": (lambda d: d["hooks"]["admit"].update(returns="bool"), "returned str | None"),
    "a hook is asked in another way": (lambda d: d["hooks"]["admit"].update(first=False), "in another way"),
    "a field is gone": (lambda d: d["names"]["Tool"]["fields"].pop("timeout_s"), "Tool.timeout_s is gone"),
    "a field is retyped": (
        lambda d: d["names"]["ExitInfo"]["fields"]["pid"].update(type="str"),
        "ExitInfo.pid was int and is str",
    ),
    "a field is required": (
        lambda d: d["names"]["Tool"]["fields"]["timeout_s"].update(required=True),
        "Tool.timeout_s is required now",
    ),
    "a new field is required": (
        lambda d: d["names"]["Tool"]["fields"].update(new={"type": "int", "required": True}),
        "Tool.new is new and not optional",
    ),
    "fields change places": (lambda d: d["names"]["Extent"]["positional"].reverse(), "in another order"),
    "a method that plugins implement is new": (
        lambda d: _members("Driver")(d).update(new=_members("Driver")(d)["close"]),
        "Driver.new is new",
    ),
    "a method is gone": (lambda d: _members("Kernel")(d).pop("nice"), "Kernel.nice is gone"),
    "an argument that plugins implement is new": (
        lambda d: _members("Policy")(d)["rank"]["arguments"].update(new=OPTIONAL),
        "Policy.rank.new is new and not optional",
    ),
    "an argument of a function is required": (
        lambda d: d["names"]["probe"]["arguments"]["config"].update(required=True),
        "probe.config is required now",
    ),
    "an optional argument comes first": (
        lambda d: d["names"]["probe"].update(arguments={"new": OPTIONAL, **d["names"]["probe"]["arguments"]}),
        "probe takes its arguments in another order",
    ),
    "an error is no Error any more": (lambda d: d["names"]["Refused"]["bases"].remove("Error"), "Refused is no Error"),
    "a name is gone": (lambda d: d["names"].pop("Fair"), "Fair is gone"),
    "a struct is something else": (lambda d: d["names"]["Tool"].update({"is": "class"}), "Tool was a struct"),
}


@pytest.mark.parametrize("change", ADDS)
def test_what_only_adds_breaks_nothing(contract: ModuleType, there: dict[str, Any], change: str) -> None:
    changed = copy.deepcopy(there)
    ADDS[change](changed)
    broken, added = contract.compare(there, changed)
    assert broken == [] and len(added) == 1


@pytest.mark.parametrize("change", BREAKS)
def test_what_breaks_plugins_is_found(contract: ModuleType, there: dict[str, Any], change: str) -> None:
    edit, line = BREAKS[change]
    changed = copy.deepcopy(there)
    edit(changed)
    broken, _ = contract.compare(there, changed)
    assert len(broken) == 1 and line in broken[0]


def test_a_broken_promise_fails_until_the_version_is_raised(
    contract: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(contract.DATA, tmp_path / "data")
    promised = tmp_path / "data" / f"contract-{llm_os.CONTRACT}.json"
    text = promised.read_text().replace('"pick_victim"', '"choose_victim"')
    promised.write_text(text)
    code, lines = contract.check(tmp_path / "data", write=True)
    assert code == 1 and "breaks plugins: hook choose_victim is gone" in lines
    assert promised.read_text() == text, "what was promised is not written over"
    monkeypatch.setattr(llm_os, "CONTRACT", llm_os.CONTRACT + 1)
    assert contract.check(tmp_path / "data")[0] == 1, "the new version is not written down"
    assert contract.check(tmp_path / "data", write=True)[0] == 0
    assert contract.check(tmp_path / "data") == (0, ["the contract is as it was promised"])


def test_what_only_adds_passes_and_asks_to_be_written_down(contract: ModuleType, tmp_path: Path) -> None:
    promised = tmp_path / f"contract-{llm_os.CONTRACT}.json"
    older = contract.now()
    older["hooks"].pop("pick_victim")
    promised.write_text(json.dumps(older))
    code, lines = contract.check(tmp_path)
    assert code == 0 and lines == ["only adds: hook pick_victim is new", "make contract writes them down"]
    assert contract.check(tmp_path, write=True)[0] == 0
    assert contract.check(tmp_path) == (0, ["the contract is as it was promised"])


# -- the version before ------------------------------------------------------------------------------------------------

PLUGIN = """
import llm_os

@llm_os.hookimpl
def admit(request):
    return "not today"
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A plugin for contract 1."""
    package, info = tmp_path / "older_plugin", tmp_path / "older_plugin-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(PLUGIN)
    (package / "llm_os.toml").write_text('[older_plugin]\nsummary = "x"\ncontract = 1\nhooks = ["admit"]\n')
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: older-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llm_os]\nolder_plugin = older_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "older_plugin"


def refusal(name: str) -> str:
    with llm_os.Kernel(llm_os.Config(driver="sim", plugins=(name,))) as kernel, pytest.raises(llm_os.Refused) as caught:
        kernel.stream(llm_os.Request(model="sim:a", prompt="x")).result()
    return str(caught.value)


def test_a_plugin_for_this_contract_boots_without_a_word(installed: str, caplog: pytest.LogCaptureFixture) -> None:
    assert refusal(installed) == "not today"
    assert caplog.records == []


def test_a_plugin_for_the_contract_before_works_with_a_warning(
    installed: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hookspecs, "CONTRACT", 2)
    assert refusal(installed) == "not today"
    (record,) = [record for record in caplog.records if installed in record.getMessage()]
    assert record.levelno == logging.WARNING and record.name == "llm_os.plugins"
    assert record.getMessage() == "plugin 'older_plugin' is for contract 1, and 2 is the last to take it"


def test_a_plugin_for_an_older_contract_or_a_later_one_is_refused(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for contract in (3, 0):
        monkeypatch.setattr(hookspecs, "CONTRACT", contract)
        with pytest.raises(llm_os.ConfigError, match=rf"it is for contract 1, this llm-os has {contract}; install"):
            llm_os.Kernel(llm_os.Config(driver="sim", plugins=(installed,)))


@pytest.mark.parametrize("form", ["admit", "admit.request"])
def test_a_deprecated_form_works_with_a_warning_that_says_what_to_use(
    installed: str, form: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hookspecs.DEPRECATED, form, "use weigh(request)")
    assert refusal(installed) == "not today"
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"plugin 'older_plugin' uses {form}," in message and message.endswith("; use weigh(request)")
