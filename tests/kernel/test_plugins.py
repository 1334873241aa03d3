"""Third-party plugins: found by entry point, loaded only by name, asked before built-ins, named when they fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import llm_os

Install = Callable[..., None]


SHOUT = """
import llm_os
from llm_os.drivers.sim import SimImage

class Loud(SimImage, frozen=True, kw_only=True):
    def encode(self, text, *, raw):
        return super().encode(text.upper(), raw=raw)

@llm_os.hookimpl
def open_image(model, config):
    return Loud(name=model) if model == "sim:a" else None
"""


def ask(kernel: llm_os.Kernel, model: str, prompt: str) -> str:
    sampling = llm_os.Sampling(max_tokens=8, temperature=0)
    return kernel.stream(llm_os.Request(model=model, prompt=prompt, sampling=sampling)).result().text


def test_a_plugin_is_asked_before_built_ins_and_only_if_it_is_named(install: Install) -> None:
    install("shout_plugin", SHOUT, "open_image")
    with llm_os.Kernel(llm_os.Config(driver="sim")) as plain:
        expected, quiet = ask(plain, "sim:a", "HELLO"), ask(plain, "sim:a", "hello")
    with llm_os.Kernel(llm_os.Config(driver="sim", plugins=("shout_plugin",))) as loud:
        assert ask(loud, "sim:a", "hello") == expected != quiet
        assert len(ask(loud, "sim:b", "hello")) == 8
    enabled = llm_os.enabled_plugins(llm_os.Config(plugins=("shout_plugin",)))
    assert [manifest.version for manifest in enabled if manifest.name == "shout_plugin"] == ["1.0"]
    assert "shout_plugin" not in [manifest.name for manifest in llm_os.enabled_plugins()]


DRIVER = """
import llm_os
from llm_os.drivers.sim import SimDriver, probe_sim

def broken_probe():
    raise OSError("no such bus")

@llm_os.hookimpl
def register_drivers(register):
    register("mine", SimDriver, probe_sim)
    register("broken", SimDriver, broken_probe)
"""


def test_a_plugin_adds_a_driver_and_a_raising_probe_does_not_hide_the_others(install: Install) -> None:
    install("driver_plugin", DRIVER, "register_drivers")
    config = llm_os.Config(driver="mine", plugins=("driver_plugin",))
    with llm_os.Kernel(config) as kernel:
        assert len(ask(kernel, "sim:a", "hello")) == 8
    probes = {info.driver: info for info in llm_os.probe(config)}
    assert "no such bus" in (probes["broken"].unavailable or "")
    assert probes["sim"].unavailable is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module", "cannot be imported: ModuleNotFoundError"),
        ("import llm_os\n@llm_os.hookimpl\ndef open_imgae(model): return None", "does not fit the hooks.*open_imgae"),
        ("import llm_os\n@llm_os.hookimpl\ndef register_drivers(register): register('cpu', 1, 2)", "named 'cpu'"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named(install: Install, source: str, message: str) -> None:
    name = f"bad_plugin_{abs(hash(source)) % 10**6}"
    install(name, source, "register_drivers")
    with pytest.raises(llm_os.ConfigError, match=message):
        llm_os.Kernel(llm_os.Config(driver="sim", plugins=(name,)))
