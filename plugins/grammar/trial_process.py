"""The process in which grammars are tried: compiles what comes on stdin, says on stdout what was wrong with it.

Run as a file, without llm-os. What a grammar can do to it (take for ever, all memory, or overflow the stack) it cannot
do to the kernel any more when it has been well here: there is less of everything than there.
"""

from __future__ import annotations

import json
import struct
import sys
import threading
from typing import Any

sys.path += [path for path in sys.argv[1:] if path not in sys.path]  # -I leaves out where the kernel found it

import llguidance

STACK = 1 << 20
MEMORY = 512 << 20  # bytes of address space beyond what this process begins with
MAX_NODES = 200  # parts of a schema that are looked at to say where it is wrong


class Bytes:
    """A vocabulary of bytes, as llguidance.LLTokenizer takes it."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = ()
    is_tokenizer_wrapper = True

    def __init__(self) -> None:
        self.tokens = [*(bytes((byte,)) for byte in range(256)), b""]

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def limit_memory() -> None:
    try:
        import resource
        from pathlib import Path

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):  # not Linux: who waits for this process limits its time still
        return
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def attempt(grammar: str, limits: dict[str, Any]) -> str:
    """What is wrong with it, "" if nothing is. Computes its first mask too."""
    tokenizer = llguidance.LLTokenizer(Bytes(), eos_token=256, slices=[])  # type: ignore[arg-type]
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**limits))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return str(matcher.get_error())


def locate(schema: Any, wrong: str, limits: dict[str, Any], options: dict[str, Any]) -> str:
    """The JSON pointer of the smallest part of a schema that is wrong in the same way."""
    place, parts = "", [("", schema)]
    for pointer, part in parts:
        if len(parts) > MAX_NODES:
            return place
        if isinstance(part, dict):
            parts += [(f"{pointer}/{key}", value) for key, value in part.items() if isinstance(value, dict | list)]
            if pointer and attempt(to_grammar("json_schema", json.dumps(part), options), limits) == wrong:
                place = pointer
        elif isinstance(part, list):
            parts += [(f"{pointer}/{n}", value) for n, value in enumerate(part) if isinstance(value, dict | list)]
    return place


def to_grammar(kind: str, source: str, options: dict[str, Any]) -> str:
    if kind == "json_schema":
        return str(llguidance.LLMatcher.grammar_from_json_schema(source, defaults=options))  # type: ignore[arg-type]
    if kind == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(source))
    return str(llguidance.LLMatcher.grammar_from_lark(source))


def answer(question: dict[str, Any]) -> dict[str, str]:
    kind, source, limits, options = (question[key] for key in ("kind", "source", "limits", "options"))
    try:
        wrong = attempt(to_grammar(kind, source, options), limits)
    except Exception as error:
        wrong = str(error)
    where = ""
    if wrong and kind == "json_schema" and len(source) < 65536:
        where = locate(json.loads(source), wrong, limits, options)
    return {"wrong": wrong[:4000], "where": where}


def serve() -> None:
    say({})
    while head := sys.stdin.buffer.read(4):
        question = json.loads(sys.stdin.buffer.read(struct.unpack("<I", head)[0]))
        say(answer(question))


def say(reply: dict[str, str]) -> None:
    data = json.dumps(reply).encode()
    sys.stdout.buffer.write(struct.pack("<I", len(data)) + data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    limit_memory()
    threading.stack_size(STACK)
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
