"""`llm-os run`: the answer on stdout, all else on stderr, and an end that is always clean."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data"


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def test_the_answer_alone_is_on_stdout(run, sim):
    done = run("run", "sim:a", "hello", "--max-tokens", "40", "--temperature", "0", *sim)
    assert done.returncode == 0
    assert done.stderr == ""
    assert 20 <= len(done.stdout.rstrip("\n")) <= 40
    assert done.stdout.endswith("\n")


def test_json_is_one_object_with_the_same_answer(run, sim):
    arguments = ("sim:a", "hello", "--max-tokens", "40", "--temperature", "0", *sim)
    text = run("run", *arguments).stdout
    done = run("run", *arguments, "--json")
    report = json.loads(done.stdout)
    assert list(report) == ["text", "token_ids", "prompt_tokens", "completion_tokens", "finish_reason", "timings"]
    assert report["text"].rstrip("\n") == text.rstrip("\n")
    assert report["token_ids"] == ids_of(report["text"])
    assert report["prompt_tokens"] == len("user: hello\n")
    assert report["completion_tokens"] == 40
    assert report["finish_reason"] == "length"
    assert list(report["timings"]) == ["load_s", "ttft_s", "prefill_tok_s", "decode_tok_s"]
    assert all(value >= 0 for value in report["timings"].values())
    assert done.stderr == ""


def test_raw_leaves_out_the_template(run, sim):
    report = json.loads(run("run", "sim:a", "hello", "--raw", "--json", "--max-tokens", "4", *sim).stdout)
    assert report["prompt_tokens"] == len("hello")


def test_system_comes_before_the_prompt(run, sim):
    done = run("run", "sim:a", "hi", "--system", "be brief", "--json", "--max-tokens", "4", *sim)
    assert json.loads(done.stdout)["prompt_tokens"] == len("system: be brief\nuser: hi\n")


@pytest.mark.parametrize(("options", "prompt"), [(["--raw"], "a\r\n b\n"), ([], "user: a\r\n b\n")])
def test_a_piped_prompt_is_taken_as_it_stands(run, sim, options, prompt):
    """Only a chat message loses the line's end that `echo` adds."""
    done = run("run", "sim:a", *options, "--json", "--max-tokens", "4", *sim, input="a\r\n b\n")
    assert json.loads(done.stdout)["prompt_tokens"] == len(prompt)


def test_a_prompt_may_begin_with_a_dash_behind_two(run, sim):
    done = run("run", "--json", "--max-tokens", "4", *sim, "sim:a", "--", "- a list")
    assert json.loads(done.stdout)["prompt_tokens"] == len("user: - a list\n")


def test_stop_strings_end_the_answer_and_are_left_out(run, sim):
    arguments = ("run", "sim:a", "hello", "--raw", "--temperature", "0", "--max-tokens", "200", "--json", *sim)
    whole = json.loads(run(*arguments).stdout)["text"]
    report = json.loads(run(*arguments, "--stop", "###", "--stop", whole[20:24]).stdout)
    assert report["finish_reason"] == "stop"
    assert whole.startswith(report["text"]) and whole[20:24] not in report["text"]


def test_the_same_seed_gives_the_same_answer(run, sim):
    def answer(seed: str) -> str:
        return run("run", "sim:a", "hi", "--temperature", "1", "--seed", seed, "--max-tokens", "30", *sim).stdout

    assert answer("7") == answer("7") != answer("8")


@pytest.mark.parametrize("text", ["", "\n", "  \n"])
def test_an_empty_stdin_is_an_empty_prompt(run, sim, text):
    done = run("run", "sim:a", *sim, input=text)
    assert (done.returncode, done.stdout) == (2, "")
    assert "prompt is empty" in done.stderr


def test_stdin_that_is_no_text_is_refused_with_the_place(run, sim):
    done = run("run", "sim:a", *sim, input=b"good\xff")
    assert done.returncode == 2
    assert "byte 4" in done.stderr


def test_endless_stdin_is_refused_in_bounded_memory(environment, sim):
    with Path("/dev/zero").open("rb") as zeros:
        done = subprocess.run(
            [sys.executable, "-m", "llm_os", "run", "sim:a", *sim],
            stdin=zeros,
            capture_output=True,
            env=environment,
            text=True,
        )
    assert done.returncode == 2
    assert "16777216 bytes" in done.stderr


def test_a_terminal_without_a_prompt_is_told_how_to_give_one(terminal, sim):
    code, said = terminal("run", "sim:a", *sim).end()
    assert code == 2
    assert "no prompt" in said and "llm-os chat" in said


def test_an_answer_that_fills_the_context_says_so_on_stderr(run, sim):
    done = run("run", "sim:a?context_length=64", "hi", *sim)
    assert done.returncode == 0
    assert len(done.stdout) > 40
    assert "no more room" in done.stderr


def test_control_characters_of_an_answer_do_not_reach_a_terminal(environment):
    """Nor do characters that it cannot show stop the answer; a pipe gets the text as it is."""
    program = (
        "from llm_os.shell import answer, stdio; stdio.prepare(); out = answer.Answer(); "
        "out._terminal = {terminal}; out.write('a\\x1b[2Jé😀\\ud800\\tz'); out.end()"
    )

    def shown(terminal: bool, encoding: str) -> bytes:
        command = [sys.executable, "-c", program.format(terminal=terminal)]
        return subprocess.run(
            command, check=True, stdout=subprocess.PIPE, env=environment | {"PYTHONIOENCODING": encoding}
        ).stdout

    assert shown(True, "utf-8").decode() == "a\ufffd[2Jé😀?\tz\n"
    assert shown(False, "utf-8").decode() == "a\x1b[2Jé😀?\tz\n"
    assert shown(True, "ascii") == b"a?[2J???\tz\n"


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_of_an_answer_ends_it_on_a_line_of_its_own(start, sim, endless, number, code):
    program = start("run", endless, "hi", *sim)
    program.read_until("e")
    program.signal(number)
    ended, rest = program.end()
    assert ended == code
    assert rest.endswith("\n")
    assert program.process.stderr.read() == b""


def test_ctrl_c_at_the_terminal_while_the_prompt_is_read_ends_without_an_answer(terminal, sim, tmp_path, endless):
    prompt = tmp_path / "prompt"
    prompt.write_text("many words " * 1_000_000)
    with prompt.open() as file:
        program = terminal("run", endless, "--driver", "sim", "--memory", "256MiB", stdin=file)
    program.read_until("reading the prompt")
    program.type("\x03")
    code, rest = program.end()
    assert code == 130
    assert "Traceback" not in rest


def test_ctrl_c_while_a_model_loads_ends_quietly(terminal, smollm2):
    program = terminal("run", str(smollm2), "hi", "--driver", "cpu")
    program.read_until("starting", "loading")
    program.type("\x03")
    code, rest = program.end()
    assert code == 130
    assert "Traceback" not in rest and "llm-os:" not in rest


def test_an_interrupted_pull_leaves_nothing_behind(start, environment):
    """The package index accepts the connection and then says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as index:
        url = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        program = start("pull", "pip:thing==1.0/thing/model.gguf", PIP_INDEX_URL=url, PIP_CONFIG_FILE=os.devnull)
        index.settimeout(60)
        peer, _ = index.accept()
        with peer:
            program.signal(signal.SIGINT)
            assert program.end() == (130, "")
    home = Path(environment["LLM_OS_HOME"])
    assert [path for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    assert b"Traceback" not in program.process.stderr.read()


def test_a_reader_that_leaves_ends_the_program_quietly(start, sim, endless):
    program = start("run", endless, "hi", *sim)
    program.read_until("e")
    program.close()
    assert program.process.wait(60) == 141
    assert program.process.stderr.read() == b""


def test_a_reader_that_was_never_there_is_no_error_either(environment):
    """What is still in the buffer as the interpreter ends does not bring it up again."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "llm_os", "models", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_is_told_in_one_line(environment, sim):
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llm_os", "run", "sim:a", "hi", "--max-tokens", "5", *sim],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "No space left" in done.stderr


# -- the real model ----------------------------------------------------------------------------------------------------


def test_the_real_model_knows_the_capital_of_france(run, smollm2):
    done = run("run", str(smollm2), "What is the capital of France?", "--temperature", "0", "--driver", "cpu")
    assert done.returncode == 0
    assert "Paris" in done.stdout
    assert done.stderr == ""


def test_raw_exact_tokens_are_those_of_the_reference(run, smollm2):
    case = json.loads((DATA / "smollm2_reference.json").read_text())["cases"][0]
    options = ("--raw", "--precision", "exact", "--temperature", "0", "--max-tokens", "32", "--json")
    done = run("run", str(smollm2), *options, "--driver", "cpu", input=case["prompt"])
    report = json.loads(done.stdout)
    assert report["token_ids"] == case["greedy"]
    assert report["prompt_tokens"] == len(case["ids"])
    assert report["completion_tokens"] == 32
    assert report["timings"]["load_s"] > 0
