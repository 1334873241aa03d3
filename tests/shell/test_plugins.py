"""`llm-os plugins`: what is installed and what is enabled, the settings file, and a package to begin with.

That packages of strangers are found, enabled and used is in tests/wheels.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import llm_os
from llm_os.shell import extensions, plugins, scaffold, settings
from llm_os.shell.options import MachineOptions


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings file of a user who has none."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "llm-os" / "config.toml"


@pytest.fixture
def written(file: Path) -> Path:
    file.parent.mkdir(parents=True)
    return file


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A plugin whose manifest has a problem, and which must never be imported."""
    package, info = tmp_path / "site" / "too_new", tmp_path / "site" / "too_new-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "llm_os.toml").write_text('[too_new]\nsummary = "from tomorrow"\ncontract = 999\nhooks = []\n')
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: too-new\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llm_os]\ntoo_new = too_new\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "too_new"


# -- the settings file -------------------------------------------------------------------------------------------------


def test_every_kernel_of_the_command_line_has_what_the_settings_say(written: Path) -> None:
    written.write_text('plugins = ["-persistence"]\npolicy = "fifo"\n[options.drivers]\nloud = 11\n')
    config = MachineOptions(driver="sim", memory="64MiB").config()
    assert (
        config.plugins == ("-persistence",) and config.policy == "fifo" and config.options == {"drivers": {"loud": 11}}
    )
    assert config.driver == "sim"
    assert "persistence" not in [manifest.name for manifest in llm_os.enabled_plugins(config)]


def test_without_a_file_nothing_is_set(file: Path) -> None:
    assert settings.config() == llm_os.Config()
    assert settings.path() == file


def test_a_relative_xdg_config_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "here")
    assert settings.path() == Path.home() / ".config" / "llm-os" / "config.toml"


DAMAGED = {
    "no TOML": ("plugins = [", "config.toml: "),
    "an unknown field": ('plugin = ["x"]', "there is no field 'plugin'; there are plugins, policy, options"),
    "plugins that are no list": ('plugins = "x"', "plugins of Config: Expected"),
    "options that are no table": ("options = 7", "options of Config: Expected"),
    "a kernel's option": ('memory = "1GiB"', "there is no field 'memory'"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_told_in_a_line(written: Path, what: str) -> None:
    text, message = DAMAGED[what]
    written.write_text(text)
    for read in (settings.config, settings.plugins, lambda: settings.write_plugins(("x",))):
        with pytest.raises(llm_os.ConfigError) as caught:
            read()
        assert str(written) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)
    assert written.read_text() == text, "nor is it written over"


@pytest.mark.parametrize("data", [b"\xff\xfe", b"#" * (2 << 20)])
def test_a_file_that_is_no_text_or_too_long_is_told_in_a_line(written: Path, data: bytes) -> None:
    written.write_bytes(data)
    with pytest.raises(llm_os.ConfigError, match=r"config\.toml is "):
        settings.read()


def test_only_the_list_of_plugins_is_changed(written: Path) -> None:
    text = (
        '# mine\npolicy = "fifo"  # quick\n\nplugins = [\n  "a",  # one\n  "b",\n]\n\n[options.a]\nplugins = ["no"]\n'
    )
    written.write_text(text)
    written.chmod(0o600)
    settings.write_plugins(("a", "-formats"))
    assert written.read_text() == text.replace('[\n  "a",  # one\n  "b",\n]', '["a", "-formats"]')
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert settings.plugins() == ("a", "-formats")


def test_a_list_that_cannot_be_changed_is_left_to_its_writer(written: Path) -> None:
    for text in ('"plugins" = ["a"]\n', "plugins = ['a]b']\n"):
        written.write_text(text)
        with pytest.raises(llm_os.ConfigError, match=r'write there: plugins = \["x"\]'):
            settings.write_plugins(("x",))
        assert written.read_text() == text


def test_the_file_is_replaced_whole_and_through_a_link(written: Path, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.toml"
    real.write_text("# mine\n")
    written.symlink_to(real)
    settings.write_plugins(("x",))
    assert written.is_symlink() and real.read_text() == 'plugins = ["x"]\n# mine\n'
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_write_that_fails_leaves_the_file_as_it_was(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written.write_text("# mine\n")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        settings.write_plugins(("x",))
    assert [path.name for path in written.parent.iterdir()] == ["config.toml"]
    assert written.read_text() == "# mine\n"


def test_an_enabled_plugin_that_is_gone_is_told_with_the_way_out(written: Path) -> None:
    written.write_text('plugins = ["gone"]')
    with pytest.raises(
        llm_os.ConfigError, match=r"'gone' is enabled in .* not installed; llm-os plugins disable gone forgets it"
    ):
        settings.config()
    assert plugins.disable("gone") == 0
    assert settings.config() == llm_os.Config()


def test_options_of_a_plugin_that_is_not_enabled_wait_for_it(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written.write_text('plugins = ["-policies"]\n[options.policies]\na = 1\n[options.polices]\na = 1\n')
    assert settings.config().options == {}
    settings.write_plugins(())
    assert settings.config().options == {"policies": {"a": 1}}
    plugins.list_plugins()
    assert "has options for a plugin 'polices', which is not installed" in capsys.readouterr().err


# -- list, info, enable, disable ---------------------------------------------------------------------------------------


def test_list_shows_what_is_on_off_missing_and_broken(
    written: Path, installed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written.write_text('plugins = ["-persistence", "gone"]')
    plugins.list_plugins()
    shown = capsys.readouterr()
    states = {line.split()[0]: line for line in shown.out.splitlines()[1:]}
    assert " on " in states["formats"] and " off " in states["persistence"]
    assert " missing " in states["gone"] and " broken " in states["too_new"]
    assert "plugin 'too_new': it is for contract 999" in shown.err
    plugins.list_plugins(json=True)
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["plugins"]}
    assert rows["formats"]["enabled"] and not rows["persistence"]["enabled"] and report["missing"] == ["gone"]
    assert rows["too_new"]["version"] == "1.0" and "contract 999" in rows["too_new"]["problem"]
    assert report["settings"] == str(written)


def test_info_shows_the_manifest(file: Path, installed: str, capsys: pytest.CaptureFixture[str]) -> None:
    plugins.info("policies")
    shown = capsys.readouterr().out
    for line in ("hooks         register_policies", "capabilities  none", "enabled       yes"):
        assert line in shown.splitlines()
    plugins.info("too_new", json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["distribution"] == "too-new" and report["enabled"] is False and "contract 999" in report["problem"]
    with pytest.raises(llm_os.ConfigError, match="'policeis' is not installed; did you mean 'policies'"):
        plugins.info("policeis")


def test_a_manifest_cannot_forge_lines_or_move_the_cursor(
    file: Path, installed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = "x\\ncapabilities  none\\u001b[2K"
    evil = f'[too_new]\nsummary = "{summary}"\ncontract = 1\nhooks = []\ncapabilities = ["secrets"]\n'
    (tmp_path / "site" / "too_new" / "llm_os.toml").write_text(evil)
    plugins.info("too_new")
    plugins.list_plugins()
    with pytest.raises(llm_os.ConfigError, match="nobody can be asked"):
        plugins.enable("too_new")
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert "\x1b" not in text and "capabilities  none" not in text.splitlines()
        assert "capabilities  secrets" in text.splitlines()


def test_a_plugin_whose_manifest_has_a_problem_is_not_enabled(file: Path, installed: str) -> None:
    with pytest.raises(llm_os.ConfigError, match="'too_new' cannot be enabled: it is for contract 999"):
        plugins.enable(installed, yes=True)
    assert not file.exists()


def test_a_built_in_plugin_is_disabled_and_enabled_again(file: Path) -> None:
    assert plugins.disable("policies") == 0
    assert settings.plugins() == ("-policies",)
    assert plugins.disable("policies") == 0
    assert plugins.enable("policies", yes=True) == 0
    assert settings.plugins() == ()
    with pytest.raises(llm_os.ConfigError, match="not installed"):
        plugins.disable("nobody")


@pytest.mark.parametrize(("answer", "enabled"), [("y", True), ("n", False), ("", False)])
def test_at_a_terminal_somebody_is_asked(terminal, run, answer: str, enabled: bool) -> None:
    run("plugins", "disable", "policies")
    program = terminal("plugins", "enable", "policies")
    asked = program.read_until("[y/N]")
    assert "in no sandbox" in " ".join(asked.split())
    for told in ("policies", "llm-os-runtime", "register_policies", "capabilities", "contract"):
        assert told in asked
    program.type(f"{answer}\n")
    code, _ = program.end()
    assert (code == 0) == enabled
    rows = json.loads(run("plugins", "list", "--json").stdout)["plugins"]
    assert [row["enabled"] for row in rows if row["name"] == "policies"] == [enabled]


def test_where_nobody_can_be_asked_it_needs_a_yes(run) -> None:
    run("plugins", "disable", "policies")
    done = run("plugins", "enable", "policies", input="y\n")
    assert done.returncode == 2 and "add --yes" in done.stderr.splitlines()[-1]
    assert run("plugins", "enable", "policies", "--yes").returncode == 0


def test_a_damaged_file_fails_every_command_that_needs_it_in_one_line(run, environment) -> None:
    file = Path(environment["XDG_CONFIG_HOME"]) / "llm-os" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text("plugins = [")
    for command in (("run", "sim:a", "hi", "--driver", "sim", "--memory", "64MiB"), ("plugins", "list")):
        done = run(*command)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and str(file) in done.stderr
    assert run("--help").returncode == 0
    doctor = run("doctor", "--json")
    assert doctor.returncode == 1 and any(str(file) in problem for problem in json.loads(doctor.stdout)["problems"])


def test_no_default_plugin_adds_commands_so_that_help_asks_none() -> None:
    """`llm-os --help` looks for commands of plugins in the settings file only."""
    assert [each.name for each in llm_os.enabled_plugins() if "register_commands" in each.hooks] == []


def test_help_without_plugins_reads_no_manifest_and_boots_nothing(environment) -> None:
    report = (
        "import sys; sys.argv = ['llm-os', '--help']; from llm_os.__main__ import main; main(); "
        "print([name for name in sys.modules if name.startswith('llm_os.')], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, env=environment)
    assert "llm_os.kernel.manifest" not in done.stderr and "llm_os.kernel.kernel" not in done.stderr
    assert "llm_os.shell.cli" in done.stderr


def test_commands_of_plugins_without_plugins_are_none(file: Path) -> None:
    assert extensions.commands(()) == ({}, [])


# -- new ---------------------------------------------------------------------------------------------------------------

BAD_NAMES = {
    "Loud": "no name for a plugin",
    "../evil": "no name for a plugin",
    "a b": "no name for a plugin",
    "1st": "no name for a plugin",
    "a--b": "no name for a plugin",
    "x" * 65: "no name for a plugin",
    "class": "Python's or llm-os's own",
    "json": "Python's or llm-os's own",
    "llm-os": "Python's or llm-os's own",
    "policies": "there is a plugin 'policies' already",
    "msgspec": "there is a package 'msgspec' installed already",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_new_takes_no_name_that_would_not_work(name: str, tmp_path: Path, file: Path) -> None:
    with pytest.raises(llm_os.ConfigError, match=BAD_NAMES[name]):
        plugins.new(name, into=tmp_path / "src")
    assert not (tmp_path / "src").exists()


def test_new_writes_a_package_and_nothing_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugins.new("my-plugin", into=tmp_path)
    folder = Path(capsys.readouterr().out.strip())
    files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert set(files) == {
        "README.md",
        "pyproject.toml",
        "my_plugin/__init__.py",
        "my_plugin/llm_os.toml",
        "my_plugin/plugin.py",
        "tests/test_plugin.py",
    }
    assert not any("{name}" in text or "{module}" in text for text in files.values())
    assert scaffold.module_of("my-plugin") == "my_plugin"
    with pytest.raises(llm_os.ConfigError, match="is there already; choose another name or --into"):
        plugins.new("my-plugin", into=tmp_path)
