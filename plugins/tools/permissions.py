"""Who may do what: asked of people and rules, never of models. Knows tools' definitions; runs nothing.

    rules ──deny──> no        a call ──class──> "read:/etc/hosts", "host:example.com", or "" where all are alike
      │ allow ──> yes
      └ ask ──> granted before, for this definition and this class? ──> yes
                    └ ask the host (`ask`): "once", "session", "always", "no";  nobody to ask ──> no

A grant holds for one definition (the hash of name, description and parameters) and one class of arguments: a tool that
changes, or that is to do something else, is asked for again. Nothing that a model says gets here but the arguments that
are asked about.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import re
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import anyio
import msgspec
from msgspec import Struct

from llm_os import ConfigError, Tool

Answer = Literal["once", "session", "always", "no"]
_LONGEST = 1024  # characters of a class of arguments
_UP = re.compile(r"(?<![^/\\:\"'=,\s])\.\.(?![^/\\\"',\s])")  # as a part of a path, in JSON and options too
_log = logging.getLogger("llm_os.tools")


class Rule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is decided without asking. `*` and `?` stand for anything, slashes too. A class with ".." in its path is
    never allowed by a rule."""

    tool: str = "*"  # its name
    what: str = "*"  # the class of its arguments
    decision: Literal["allow", "deny", "ask"]


class Question(Struct, frozen=True, kw_only=True):
    """What a person is asked. `arguments` are exactly those that the tool will get. All of it may be a stranger's text:
    show it escaped."""

    tool: str
    description: str
    what: str
    arguments: dict[str, Any]
    definition: str  # hash


Ask = Callable[[Question], Answer | Awaitable[Answer]]


class Permissions:
    """What the tools of a session may do. One for each person or tenant; use it for all their conversations.

    `ask` is called in the event loop of the conversation, one question at a time; a plain function should not block.
    What raises, or answers anything else, has said no. `file` keeps what is allowed "always"; without it that is
    "session". Raises ConfigError for a file that cannot be read.
    """

    def __init__(self, rules: Sequence[Rule] = (), ask: Ask | None = None, file: Path | None = None) -> None:
        self._rules = tuple(rules)
        self._ask = ask
        self._file = file
        self._session: set[tuple[str, str]] = set()
        self._always = _read(file) if file is not None else set[tuple[str, str]]()
        self._turn: anyio.Lock | None = None

    async def check(self, tool: Tool, arguments: Mapping[str, Any]) -> str | None:
        """Whether a call may be made: None, or why not, in one line for the model."""
        try:
            what = "" if tool.argument_class is None else tool.argument_class(arguments)
        except Exception as error:
            _log.warning("tool %s cannot say what it is asked for: %r", tool.name, error)
            return " ".join(f"it is not permitted: {error}".split())[:500]
        if not isinstance(what, str) or len(what) > _LONGEST or not _is_text(what):
            return "it is not permitted: what it is asked for cannot be told"
        decision = self._decide(tool.name, what)
        if decision == "deny":
            return "it is not permitted here"
        if decision == "allow" or (decision is None and not tool.needs_permission):
            return None
        definition = definition_hash(tool)
        if (definition, what) in self._session | self._always:
            return None
        if self._ask is None:
            return "it is not permitted, and there is nobody to ask"
        question = Question(
            tool=tool.name,
            description=tool.description,
            what=what,
            arguments=dict(arguments),
            definition=definition,
        )
        return await self._inquire(question)

    def _decide(self, tool: str, what: str) -> str | None:
        """By the first rule that fits."""
        for rule in self._rules:
            if _fits(tool, rule.tool) and _fits(what, rule.what):
                if rule.decision == "allow" and _UP.search(what):
                    continue
                return rule.decision
        return None

    async def _inquire(self, question: Question) -> str | None:
        assert self._ask is not None
        self._turn = self._turn or anyio.Lock()
        async with self._turn:
            key = (question.definition, question.what)
            if key in self._session | self._always:  # answered while this one waited
                return None
            try:
                answer = self._ask(question)
                answer = await answer if inspect.isawaitable(answer) else answer
            except Exception as error:
                _log.warning("whoever is asked for permission failed: %r", error)
                answer = "no"
            if answer == "session" or (answer == "always" and self._file is None):
                self._session.add(key)
            elif answer == "always":
                assert self._file is not None
                with suppress(ConfigError):  # what has been granted or revoked there since
                    self._always = _read(self._file)
                self._always.add(key)
                self._write()
            elif answer != "once":
                return "a person has refused it"
            return None

    def _write(self) -> None:
        assert self._file is not None
        text = json.dumps({"granted": sorted(self._always)}, indent=1)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._file.parent)  # for its owner only
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(text)
                Path(name).replace(self._file)
            except BaseException:
                with suppress(OSError):
                    Path(name).unlink()
                raise
        except OSError as error:
            _log.warning("%s: what is allowed always cannot be kept: %s", self._file, error.strerror or error)


def _fits(text: str, pattern: str) -> bool:
    """`*` and `?` are special, and nothing else: a program's class begins with a bracket."""
    return fnmatchcase(text, pattern.replace("[", "[[]"))


def _is_text(what: str) -> bool:
    """Half a surrogate, which JSON can say, is in no file and no question."""
    try:
        what.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Granted(Struct, forbid_unknown_fields=True):
    granted: list[tuple[str, str]] = []


def _read(file: Path) -> set[tuple[str, str]]:
    try:
        return set(msgspec.json.decode(file.read_bytes(), type=_Granted).granted)
    except FileNotFoundError:
        return set()
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{file}: what tools may do cannot be read ({error}); correct it or remove it") from None


def definition_hash(tool: Tool) -> str:
    """Changes with whatever a model is told of the tool."""
    told = json.dumps([tool.name, tool.description, tool.parameters], sort_keys=True, default=str)
    return hashlib.sha256(told.encode(errors="surrogatepass")).hexdigest()
