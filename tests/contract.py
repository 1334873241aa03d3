"""The contract with plugins, written down: what it is now, and whether that still keeps what was promised.

    python tests/contract.py            compare with tests/data/contract-N.json, N being llm_os.CONTRACT
    python tests/contract.py --write    the same, and write the file where nothing is broken

Promised are the hooks, and what `llm_os` exports or what can be reached from there, but for the simulator: fields of
structs, methods of protocols and classes, signatures of functions. What only adds is a change that plugins survive:

    a hook; an argument of a hook; an optional argument of a function, or of a method that plugins only call;
    a name; a field that has a default; a method of a class that plugins only use

Everything else breaks some plugin, and needs another CONTRACT: then the file of that number is written, and the form
before works for one more version (`hookspecs.DEPRECATED`).
"""

from __future__ import annotations

import collections.abc
import inspect
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

import msgspec

import llm_os
from llm_os.kernel import hookspecs

DATA = Path(__file__).parent / "data"
NOT_PROMISED = {"Report", "replay", "simulate"}  # for those who work on the kernel
MADE_FOR_YOU = {"Stream"}  # nobody but the kernel makes one
GIVEN = {"Mask"}  # protocols that plugins call and do not implement, as they do all Register*
CALLED = ("call", "iter", "next", "aiter", "anext", "enter", "exit", "aenter", "aexit")
Description = dict[str, Any]


class Describer:
    """Describes types, and remembers which others they name."""

    def __init__(self) -> None:
        self.pending: list[type] = []
        self._names = {name: getattr(llm_os, name) for name in llm_os.__all__}

    def describe(self, thing: Any) -> Description:
        if inspect.isfunction(thing):
            return {"is": "function", **self.signature(thing)}
        if not isinstance(thing, type):
            return {"is": "value"}
        if issubclass(thing, msgspec.Struct):
            return {"is": "struct", "positional": list(thing.__match_args__), "fields": self.fields(thing)}
        if issubclass(thing, BaseException):
            return {"is": "error", "bases": [base.__name__ for base in thing.__mro__ if base not in (object, thing)]}
        kind = "protocol" if getattr(thing, "_is_protocol", False) else "class"
        return {"is": kind, "members": self.members(thing)}

    def fields(self, cls: type[msgspec.Struct]) -> dict[str, Description]:
        hints = self.hints(cls)
        return {
            field.name: {"type": self.show(hints[field.name]), "required": field.required}
            for field in msgspec.structs.fields(cls)
        }

    def members(self, cls: type) -> dict[str, Description]:
        found = {name: {"type": self.show(hint)} for name, hint in self.hints(cls).items() if not name.startswith("_")}
        for name in sorted({name for base in cls.__mro__[:-1] for name in vars(base)}):
            member = inspect.getattr_static(cls, name)
            if name.startswith("_") and name.strip("_") not in self._dunders(cls):
                continue
            if isinstance(member, property):
                assert member.fget is not None
                found[name] = {"type": self.signature(member.fget)["returns"]}
            elif isinstance(member, (classmethod, staticmethod)):
                found[name] = self.signature(member.__func__)
            elif inspect.isfunction(member):
                found[name] = self.signature(member)
        return found

    def _dunders(self, cls: type) -> tuple[str, ...]:
        made = getattr(cls, "_is_protocol", False) or cls.__name__ in MADE_FOR_YOU
        return CALLED if made else (*CALLED, "init")

    def signature(self, function: Any) -> Description:
        hints = self.hints(function)
        arguments = {
            name: {
                "type": self.show(hints.get(name, Any)),
                "required": parameter.default is parameter.empty and parameter.kind not in (2, 4),
                "how": parameter.kind.name.lower(),
            }
            for name, parameter in inspect.signature(function).parameters.items()
            if name not in ("self", "cls")
        }
        return {"arguments": arguments, "returns": self.show(hints.get("return", Any))}

    def hints(self, thing: Any) -> dict[str, Any]:
        room = vars(sys.modules[thing.__module__])
        extra = {name: value for name, value in self._names.items() if name not in room}
        hints = typing.get_type_hints(thing, localns=extra)
        return {name: hint for name, hint in hints.items() if typing.get_origin(hint) is not typing.ClassVar}

    def show(self, hint: Any) -> str:
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if hint is None or hint is type(None):
            return "None"
        if origin in (typing.Union, types.UnionType):
            return " | ".join(sorted(map(self.show, inner), key=lambda shown: (shown == "None", shown)))
        if origin is typing.Literal:
            return f"Literal[{', '.join(map(repr, inner))}]"
        if origin is collections.abc.Callable:
            arguments = "..." if inner[0] is ... else ", ".join(map(self.show, inner[0]))
            return f"Callable[({arguments}), {self.show(inner[1])}]"
        if origin is not None:
            return f"{self.show(origin)}[{', '.join('...' if each is ... else self.show(each) for each in inner)}]"
        if isinstance(hint, type):
            if hint.__module__.startswith("llm_os"):
                self.pending.append(hint)
            return hint.__name__
        return str(hint).removeprefix("typing.")


def now() -> Description:
    """The contract as the code has it."""
    describer = Describer()
    hooks = {}
    for name in sorted(hookspecs.HOOKS):
        hook = getattr(hookspecs, name)
        hooks[name] = {**describer.signature(hook), "first": bool(hook.llm_os_spec["firstresult"])}
    names = {n: describer.describe(getattr(llm_os, n)) for n in llm_os.__all__ if n not in NOT_PROMISED}
    while describer.pending:
        cls = describer.pending.pop()
        if cls.__name__ not in names:
            names[cls.__name__] = describer.describe(cls)
    return {"contract": llm_os.CONTRACT, "hooks": hooks, "names": dict(sorted(names.items()))}


def compare(promised: Description, there: Description) -> tuple[list[str], list[str]]:
    """What breaks plugins, and what they survive, a line for each."""
    broken: list[str] = []
    added: list[str] = []
    for name, hook in promised["hooks"].items():
        if name not in there["hooks"]:
            broken.append(f"hook {name} is gone")
        else:
            _call(f"hook {name}", hook, there["hooks"][name], broken, added, free=True)
            if hook["first"] != there["hooks"][name]["first"]:
                broken.append(f"hook {name} is asked in another way")
    added += [f"hook {name} is new" for name in there["hooks"] if name not in promised["hooks"]]
    for name, thing in promised["names"].items():
        if name not in there["names"]:
            broken.append(f"{name} is gone")
        else:
            _thing(name, thing, there["names"][name], broken, added)
    added += [f"{name} is new" for name in there["names"] if name not in promised["names"]]
    return broken, added


def _thing(name: str, old: Description, new: Description, broken: list[str], added: list[str]) -> None:
    if old["is"] != new["is"]:
        broken.append(f"{name} was a {old['is']} and is a {new['is']}")
    elif old["is"] == "struct":
        _entries(name, old["fields"], new["fields"], broken, added)
        if new["positional"][: len(old["positional"])] != old["positional"]:
            broken.append(f"{name} takes its fields in another order")
    elif old["is"] == "error":
        broken += [f"{name} is no {base} any more" for base in old["bases"] if base not in new["bases"]]
    elif old["is"] == "function":
        _call(name, old, new, broken, added)
    elif old["is"] in ("class", "protocol"):
        implemented = old["is"] == "protocol" and name not in GIVEN and not name.startswith("Register")  # by plugins
        for member, was in old["members"].items():
            full = f"{name}.{member}"
            if member not in new["members"]:
                broken.append(f"{full} is gone")
            elif "arguments" in was and "arguments" in new["members"][member]:
                _call(full, was, new["members"][member], broken, added, strict=implemented)
            elif was != new["members"][member]:
                broken.append(f"{full} was {_short(was)} and is {_short(new['members'][member])}")
        for member in new["members"]:
            if member not in old["members"]:
                (broken if implemented else added).append(f"{name}.{member} is new")


def _call(
    name: str,
    old: Description,
    new: Description,
    broken: list[str],
    added: list[str],
    *,
    free: bool = False,
    strict: bool = False,
) -> None:
    """`free`: plugins implement it, and may leave out arguments; `strict`: they implement it with every argument."""
    if old["returns"] != new["returns"]:
        broken.append(f"{name} returned {old['returns']} and returns {new['returns']}")
    by_place = [n for n, each in old["arguments"].items() if each["how"] != "keyword_only"]
    _entries(name, old["arguments"], new["arguments"], broken, added, free=free, strict=strict)
    places = [n for n, each in new["arguments"].items() if each["how"] != "keyword_only"]
    if not free and places[: len(by_place)] != by_place:
        broken.append(f"{name} takes its arguments in another order")


def _entries(
    name: str,
    old: dict[str, Description],
    new: dict[str, Description],
    broken: list[str],
    added: list[str],
    *,
    free: bool = False,
    strict: bool = False,
) -> None:
    for entry, was in old.items():
        full = f"{name}.{entry}"
        if entry not in new:
            broken.append(f"{full} is gone")
            continue
        now = new[entry]
        if was["type"] != now["type"]:
            broken.append(f"{full} was {was['type']} and is {now['type']}")
        if now["required"] and not was["required"]:
            broken.append(f"{full} is required now")
        if was["required"] and not now["required"]:
            (broken if strict else added).append(f"{full} is optional now")
        if was.get("how") != now.get("how") and now.get("how") != "positional_or_keyword":
            broken.append(f"{full} is {now['how'].replace('_', ' ')} now")
    for entry, each in new.items():
        if entry not in old:
            survived = free or (not each["required"] and not strict)
            (added if survived else broken).append(f"{name}.{entry} is new{'' if survived else ' and not optional'}")


def _short(entry: Description) -> str:
    return str(entry.get("type", "a method"))


def check(folder: Path = DATA, *, write: bool = False) -> tuple[int, list[str]]:
    """The exit code, and what to say."""
    file = folder / f"contract-{llm_os.CONTRACT}.json"
    there = now()
    if not file.exists():
        if not write:
            return 1, [f"there is no {file.name}: make contract writes down what contract {llm_os.CONTRACT} promises"]
        _write(file, there)
        return 0, [f"{file.name} is written: {len(there['hooks'])} hooks, {len(there['names'])} names"]
    broken, added = compare(json.loads(file.read_text("utf-8")), there)
    if broken:
        way = "keep the old form, or raise CONTRACT in kernel/hookspecs.py, put the old form into DEPRECATED"
        return 1, [*(f"breaks plugins: {line}" for line in broken), f"{way} and run make contract"]
    if added and write:
        _write(file, there)
    end = f"{file.name} is written" if write else "make contract writes them down"
    return 0, [*(f"only adds: {line}" for line in added), end] if added else ["the contract is as it was promised"]


def _write(file: Path, there: Description) -> None:
    file.write_text(json.dumps(there, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    code, lines = check(write="--write" in sys.argv[1:])
    print(*lines, sep="\n")
    sys.exit(code)
