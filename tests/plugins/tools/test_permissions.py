"""Who may do what: rules, people, what is remembered, and what is never taken for an answer."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

import llm_os
from llm_os.plugins.tools import Permissions, Question, Rule
from llm_os.plugins.tools.permissions import definition_hash


def tool(**fields: Any) -> llm_os.Tool:
    def what(arguments: Mapping[str, Any]) -> str:
        return f"write:{arguments['path']}"

    schema = {"type": "object", "properties": {"path": {"type": "string"}}}
    values = {"name": "write", "description": "Writes.", "parameters": schema, "call": print, "argument_class": what}
    return llm_os.Tool(**{**values, **fields})


class Person:
    """Answers what they are told to, and remembers what they were asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Question] = []

    async def __call__(self, question: Question) -> Any:
        self.asked.append(question)
        await anyio.lowlevel.checkpoint()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def allowed(permissions: Permissions, path: str = "a", **fields: Any) -> bool:
    return anyio.run(permissions.check, tool(**fields), {"path": path}) is None


def test_nothing_is_permitted_where_nobody_can_be_asked() -> None:
    assert anyio.run(Permissions().check, tool(), {"path": "a"}) == "it is not permitted, and there is nobody to ask"
    assert allowed(Permissions(), needs_permission=False)


@pytest.mark.parametrize(
    ("answer", "again", "elsewhere"), [("once", True, True), ("session", False, True), ("always", False, True)]
)
def test_an_answer_holds_for_this_class_of_arguments(answer: str, again: bool, elsewhere: bool) -> None:
    person = Person(answer, "no", "no")
    permissions = Permissions(ask=person)
    assert allowed(permissions, "a") and len(person.asked) == 1
    assert allowed(permissions, "a") is not again
    before = len(person.asked)
    assert not allowed(permissions, "b") and len(person.asked) == before + 1
    assert person.asked[0].what == "write:a" and person.asked[0].arguments == {"path": "a"}


@pytest.mark.parametrize(
    "changed", [{"description": "Writes, and more."}, {"parameters": {"type": "object"}}, {"name": "write2"}]
)
def test_a_tool_that_changed_is_asked_for_again(changed: dict[str, Any]) -> None:
    permissions = Permissions(ask=Person("session", "no"))
    assert allowed(permissions) and allowed(permissions)
    assert not allowed(permissions, **changed)
    assert definition_hash(tool()) != definition_hash(tool(**changed))


@pytest.mark.parametrize(
    "answer", ["no", "yes", "ONCE", True, None, 1, "", ["once"], RuntimeError("the terminal is gone")], ids=repr
)
def test_whatever_is_no_clear_yes_is_a_no(answer: Any) -> None:
    permissions = Permissions(ask=Person(answer, answer))
    assert anyio.run(permissions.check, tool(), {"path": "a"}) == "a person has refused it"
    assert not allowed(permissions)  # and is not remembered


def test_what_is_always_allowed_survives_the_program(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "granted.json"
    assert allowed(Permissions(ask=Person("always"), file=file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert allowed(Permissions(file=file)) and not allowed(Permissions(file=file), "b")
    assert not allowed(Permissions(file=file), description="Changed.")
    assert not allowed(Permissions())


@pytest.mark.parametrize("content", [b"", b"{", b'{"granted": "all"}', b'{"all": true}', b"\xff"])
def test_a_file_that_is_damaged_allows_nothing(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "granted.json"
    file.write_bytes(content)
    with pytest.raises(llm_os.ConfigError, match=r"granted\.json: what tools may do cannot be read"):
        Permissions(file=file)


RULES = [
    Rule(tool="write", what="write:secret/*", decision="deny"),
    Rule(tool="write", what="write:notes/*", decision="allow"),
    Rule(tool="read*", decision="allow"),
    Rule(tool="send", decision="ask"),
    Rule(tool="ping", decision="deny"),
]


@pytest.mark.parametrize(
    ("name", "path", "needs", "decision"),
    [
        ("write", "notes/a", True, "allow"),
        ("write", "secret/a", True, "deny"),
        ("write", "secret/a", False, "deny"),
        ("write", "other", True, "ask"),
        ("write", "other", False, "allow"),
        ("read_file", "x", True, "allow"),
        ("send", "x", True, "ask"),
        ("send", "x", False, "ask"),
        ("ping", "x", False, "deny"),
        ("WRITE", "notes/a", True, "ask"),
        ("write", "notes/../secret/a", True, "ask"),
        ("write", "notes/..", True, "ask"),
        ("write", "notes\\..\\secret", True, "ask"),
        ("write", "x" * 2000, True, "deny"),
        ("write", "x" * 2000, False, "deny"),
    ],
)
def test_rules_decide_first_and_the_first_that_fits(name: str, path: str, needs: bool, decision: str) -> None:
    person = Person("once")
    permissions = Permissions(RULES, ask=person)
    assert allowed(permissions, path, name=name, needs_permission=needs) is (decision != "deny")
    assert len(person.asked) == (decision == "ask")
    assert allowed(Permissions(RULES), path, name=name, needs_permission=needs) is (decision == "allow")


def test_a_rule_that_denies_is_stronger_than_what_was_granted(tmp_path: Path) -> None:
    file = tmp_path / "granted.json"
    assert allowed(Permissions(ask=Person("always"), file=file))
    assert not allowed(Permissions([Rule(decision="deny")], file=file))


def test_a_tool_that_cannot_say_what_it_is_asked_for_is_not_permitted() -> None:
    for broken in (lambda a: a["nothing"], lambda a: 7, lambda a: None):
        assert not allowed(Permissions([Rule(decision="allow")]), argument_class=broken)


def test_questions_come_one_at_a_time_and_an_answer_counts_for_those_that_wait() -> None:
    person = Person("session")
    permissions = Permissions(ask=person)
    said: list[Any] = []

    async def main() -> None:
        async def check() -> None:
            said.append(await permissions.check(tool(), {"path": "a"}))

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(check)

    anyio.run(main)
    assert said == [None] * 5 and len(person.asked) == 1


def test_rules_are_read_from_json_strictly() -> None:
    rule = msgspec.json.decode(b'{"tool": "a", "decision": "allow"}', type=Rule)
    assert rule == Rule(tool="a", decision="allow")
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"tool": "a", "decision": "yes"}', type=Rule)


def command(*arguments: str) -> str:
    """The class of a program's arguments."""
    return json.dumps(list(arguments), separators=(",", ":"))


@pytest.mark.parametrize("path", ["../secret", "a/../b", "a/..", "..", "x=../b", "--file=../b", "a/../"])
def test_no_rule_lets_a_program_out_of_its_folder(path: str) -> None:
    rule = Rule(tool="show", what="*", decision="allow")
    for what in (command("cat", "--", path), f"read:{path}"):
        assert not allowed(Permissions([rule]), name="show", argument_class=lambda _, what=what: what)


@pytest.mark.parametrize("path", ["a", "a..b", "a/..b", "b../c", "..."])
def test_two_dots_in_a_name_lead_nowhere(path: str) -> None:
    rule = Rule(tool="show", what="*", decision="allow")
    assert allowed(Permissions([rule]), name="show", argument_class=lambda _: command("cat", "--", path))


def test_a_rule_that_is_copied_from_a_programs_class_fits_it() -> None:
    rules = [
        Rule(tool="cat", what=command("cat", "--", "secret.txt"), decision="deny"),
        Rule(tool="cat", what='["cat","--","*.txt"]', decision="allow"),
    ]
    for path, expected in (("secret.txt", False), ("a.txt", True), ("a.png", False)):
        what = command("cat", "--", path)
        assert allowed(Permissions(rules), name="cat", argument_class=lambda _, what=what: what) is expected


def test_what_was_revoked_in_the_file_stays_revoked(tmp_path: Path) -> None:
    file = tmp_path / "granted.json"
    permissions = Permissions(ask=Person("always", "always"), file=file)
    assert allowed(permissions, "a")
    file.write_text('{"granted": []}')
    assert allowed(permissions, "b")
    assert [what for _, what in msgspec.json.decode(file.read_bytes())["granted"]] == ["write:b"]


def test_half_a_character_is_refused_and_leaves_the_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "granted.json"
    permissions = Permissions(ask=Person("always", "always"), file=file)
    assert allowed(permissions, "a") and not allowed(permissions, "\ud800")
    assert allowed(Permissions(file=file), "a")
