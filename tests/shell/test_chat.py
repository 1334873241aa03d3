"""`llm-os chat`: turns, commands, and that nothing but its user ends it."""

from __future__ import annotations

import signal
import stat
from pathlib import Path

import pytest

import llm_os
from llm_os.shell.answer import Answer
from llm_os.shell.chat import Conversation
from llm_os.shell.options import SamplingOptions

PROMPT = "\x1b[?2004h"  # the line editor asks for pasted text to be marked: it reads from here on
ACCEPTED = "\x1b[?2004l"
SHORT = ("--max-tokens", "12", "--temperature", "0")


def test_each_piped_line_is_a_turn_that_sees_those_before(run, sim):
    twice = run("chat", "sim:a", *SHORT, *sim, input="same\nsame\n")
    alone = run("chat", "sim:a", *SHORT, *sim, input="same\n")
    assert twice.returncode == alone.returncode == 0
    assert twice.stderr == ""
    assert twice.stdout.startswith(alone.stdout)
    assert twice.stdout != alone.stdout * 2


def test_clear_forgets_what_was_said(run, sim):
    cleared = run("chat", "sim:a", *SHORT, *sim, input="same\n/clear\nsame\n")
    alone = run("chat", "sim:a", *SHORT, *sim, input="same\n")
    assert cleared.stdout == alone.stdout * 2


def test_a_backslash_goes_on_with_the_next_line(run, sim):
    two_lines = run("chat", "sim:a", *SHORT, *sim, input="one \\\ntwo\n")
    as_one = run("run", "sim:a", "one \ntwo", *SHORT, *sim)
    assert two_lines.stdout == as_one.stdout


def test_set_changes_how_answers_are_sampled(run, sim):
    done = run("chat", "sim:a", *SHORT, *sim, input="/set max_tokens 3\n/set\nhi\n")
    assert len(done.stdout.rstrip("\n")) <= 3
    assert "max_tokens 3, temperature 0" in done.stderr


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/set max_tokens 0", "max_tokens is 0"),
        ("/set max_tokens few", "max_tokens is 'few'"),
        ("/set temp 1", "did you mean temperature"),
        ("/dance", "no command /dance"),
        ("word " * 1000, "4096"),
        ("bad \udc80 byte", "UTF-8"),
    ],
)
def test_a_turn_that_fails_is_told_in_one_line_and_is_not_the_end(run, sim, line, named):
    alone = run("chat", "sim:a", *SHORT, *sim, input="hi\n")
    text = f"{line}\nhi\n".encode(errors="surrogateescape")
    done = run("chat", "sim:a", *SHORT, *sim, input=text)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("llm-os: ") and named in done.stderr
    assert done.stdout == alone.stdout


def test_a_conversation_longer_than_the_context_says_how_to_go_on(run, sim):
    model = "sim:a?context_length=64"
    done = run("chat", model, "--temperature", "0", "--max-tokens", "20", *sim, input="one\ntwo\nthree\n/clear\none\n")
    alone = run("chat", model, "--temperature", "0", "--max-tokens", "20", *sim, input="one\n").stdout
    assert done.returncode == 0
    assert "64" in done.stderr and "/clear" in done.stderr
    assert alone and done.stdout.startswith(alone) and done.stdout.removeprefix(alone).endswith(alone)


def test_bye_ends_before_the_next_line(run, sim):
    done = run("chat", "sim:a", *SHORT, *sim, input="/bye\nhi\n")
    assert (done.returncode, done.stdout) == (0, "")


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal, sim, endless):
    program = terminal("chat", endless, *sim)
    program.read_until(PROMPT)
    program.type("talk for ever\r")
    program.read_until(ACCEPTED)
    program.read_until("e")
    program.type("\x03")
    program.read_until(PROMPT)
    program.type("/set max_tokens 4\r")
    program.read_until(PROMPT)
    program.type("and now?\r")
    program.read_until(ACCEPTED)
    answer = program.read_until(PROMPT)
    assert 1 <= len(answer.removesuffix(PROMPT).replace("\r\n", "")) <= 4
    program.type("\x04")
    code, rest = program.end()
    assert code == 0
    assert "Traceback" not in rest


def test_an_interrupted_answer_stays_in_the_conversation_as_far_as_it_was_shown(monkeypatch, capsys, endless):
    with llm_os.Kernel(llm_os.Config(driver="sim", memory="64MiB")) as kernel:
        conversation = Conversation(kernel, endless, SamplingOptions(), "be brief")
        write, pieces = Answer.write, iter(range(5))

        def interrupted(answer: Answer, text: str) -> None:
            write(answer, text)
            if next(pieces, None) is None:
                raise KeyboardInterrupt

        monkeypatch.setattr(Answer, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            conversation.hear("talk")
    said = capsys.readouterr().out
    assert conversation.messages[0] == {"role": "user", "content": "talk"}
    assert conversation.messages[1]["role"] == "assistant"
    assert said == conversation.messages[1]["content"].rstrip("\n") + "\n"
    assert len(conversation.messages[1]["content"]) == 6


def test_ctrl_c_on_an_empty_line_says_how_to_leave(terminal, sim):
    program = terminal("chat", "sim:a", *sim)
    program.read_until(PROMPT)
    program.type("\x03")
    program.read_until("Ctrl-D or /bye")
    program.read_until(PROMPT)
    program.type("/bye\r")
    assert program.end()[0] == 0


def test_what_was_typed_is_kept_for_its_owner_alone(terminal, sim, environment):
    program = terminal("chat", "sim:a", *SHORT, *sim)
    program.read_until(PROMPT)
    program.type("remember me\r")
    program.read_until(PROMPT)
    program.type("\x04")
    assert program.end()[0] == 0
    history = Path(environment["LLM_OS_HOME"]) / "chat_history"
    assert "remember me" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_terminating_the_program_gives_the_terminal_back(terminal, sim):
    program = terminal("chat", "sim:a", *sim)
    program.read_until(PROMPT)
    program.signal(signal.SIGTERM)
    code, rest = program.end()
    assert code == 143
    assert "Traceback" not in rest
