"""The plugin alone, over bytes as a vocabulary: what is allowed, what is refused and how, and what it keeps."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import llm_os
from llm_os.drivers.sim import SimImage
from llm_os.plugins.grammar import engine, trial
from llm_os.plugins.grammar.plugin import MAX_KEPT, MAX_LANGUAGES, GrammarPlugin

IMAGE = SimImage(name="sim:bytes")
END = 256
SCHEMAS = int(os.environ.get("LLM_OS_TEST_SCHEMAS", "300"))


@pytest.fixture
def plugin() -> Iterator[GrammarPlugin]:
    plugin = GrammarPlugin()
    yield plugin
    plugin.halting()


def compiled(plugin: GrammarPlugin, kind: str, source: str) -> llm_os.Language:
    return plugin.compile_grammar(llm_os.Grammar(kind=kind, source=source), IMAGE)


def tokens_of(bits: bytes) -> list[int]:
    return [token for token in range(len(bits) * 8) if bits[token >> 3] >> (token & 7) & 1]


def walk(language: llm_os.Language, seed: int, most: int = 500) -> list[int]:
    """A random answer, without the end."""
    chooser, matcher, answer = random.Random(seed), language.matcher(), []
    while len(answer) < most and (token := chooser.choice(tokens_of(matcher.allowed(answer)))) != END:
        answer.append(token)
    return answer


# -- what is allowed ---------------------------------------------------------------------------------------------------


def test_an_answer_may_go_on_as_the_grammar_says_and_end_only_where_it_matches(plugin: GrammarPlugin) -> None:
    matcher = compiled(plugin, "regex", "ab?c").matcher()
    assert tokens_of(matcher.allowed([])) == [*b"a"]
    assert tokens_of(matcher.allowed([*b"a"])) == [*b"bc"]
    assert tokens_of(matcher.allowed([*b"abc"])) == [END]


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(a|b)*a(a|b){3}c?"),
        ("lark", 'start: "(" start? ")" | /[xy]{1,3}/'),
        ("json_schema", '{"type": "array", "items": {"enum": ["a", "ab", 1, null]}, "maxItems": 3}'),
    ],
)
def test_what_is_allowed_depends_on_the_answer_and_not_on_what_was_asked_before(
    plugin: GrammarPlugin, kind: str, source: str
) -> None:
    language = compiled(plugin, kind, source)
    answers = [walk(language, seed, 60) for seed in range(5)]
    chooser, wandering = random.Random(1), language.matcher()
    for _ in range(200):
        answer = chooser.choice(answers)
        answer = answer[: chooser.randint(0, len(answer))]
        assert wandering.allowed(answer) == language.matcher().allowed(answer)


def test_an_answer_that_does_not_match_is_an_error_and_does_not_spoil_the_matcher(plugin: GrammarPlugin) -> None:
    matcher = compiled(plugin, "regex", "abc").matcher()
    with pytest.raises(llm_os.RequestError, match="cannot go on after 2 tokens of the answer"):
        matcher.allowed([*b"ax"])
    assert tokens_of(matcher.allowed([*b"ab"])) == [*b"c"]


def test_random_answers_to_a_schema_are_valid(plugin: GrammarPlugin) -> None:
    schema = {
        "type": "object",
        "properties": {"id": {"type": "integer", "minimum": 3, "maximum": 999}, "name": {"type": "string"}},
        "required": ["id", "name"],
        "additionalProperties": False,
    }
    language = compiled(plugin, "json_schema", json.dumps(schema))
    whole = 0
    for seed in range(20):
        answer = walk(language, seed, 3000)
        if len(answer) < 3000:
            value = json.loads(bytes(answer))
            assert set(value) == {"id", "name"} and 3 <= value["id"] <= 999 and isinstance(value["name"], str)
            whole += 1
    assert whole > 5


def test_what_others_left_in_a_shared_lexer_ends_no_answer(
    plugin: GrammarPlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.LIMITS, "max_lexer_states", 300)
    language = compiled(plugin, "regex", "(a|b)*a(a|b){9}c")
    for seed in range(40):
        answer = walk(language, seed, 40)
        assert len(answer) == 40 or bytes(answer).endswith(b"c")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", '{"type": ', "the JSON schema is not JSON: Expecting value at line 1, column 10"),
        ("json_schema", "[1]", "the JSON schema is no JSON object"),
        (
            "json_schema",
            '{"properties": {"x": {"items": {"type": "strin"}}}}',
            "the JSON schema cannot be used: Invalid type: strin (at /properties/x/items)",
        ),
        ("json_schema", '{"not": {}}', 'Unimplemented keys: ["not"]'),
        ("json_schema", '{"$ref": "#/nope"}', "Pointer '/nope' does not exist"),
        ("json_schema", '{"type": "string", "pattern": "(a"}', "unclosed group, at character 1 of '(a'"),
        ("regex", "(a", "the regular expression cannot be used: unclosed group, at character 1 of '(a'"),
        ("regex", "a(?=b)", "look-around, including look-ahead and look-behind, is not supported, at character 2"),
        ("lark", "start: foo", 'the Lark grammar cannot be used: line 1, column 8: unknown name: "foo"'),
        ("lark", 'start: "a"\n  | /(b/', "line 1, column 8: unclosed group, at character 1 of '(b'"),
    ],
)
def test_a_grammar_that_is_wrong_is_refused_with_the_place(
    plugin: GrammarPlugin, kind: str, source: str, message: str
) -> None:
    with pytest.raises(llm_os.RequestError) as refused:
        compiled(plugin, kind, source)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def chain(count: int) -> str:
    definitions = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(count)}
    return json.dumps({"$defs": {**definitions, f"d{count}": {}}, "$ref": "#/$defs/d0"})


HOSTILE = {
    "a chain of references": ("json_schema", chain(15000)),
    "a chain of rules": (
        "lark",
        "start: r0\n" + "\n".join(f'r{n}: "a" r{n + 1}' for n in range(30000)) + '\nr30000: "c"',
    ),
    "a chain of terminals": (
        "lark",
        "start: T0\n" + "\n".join(f'T{n}: "a" T{n + 1}' for n in range(20000)) + '\nT20000: "c"',
    ),
    "deep brackets": ("regex", "(" * 500_000 + "a" + ")" * 500_000),
    "deep JSON": ("json_schema", '{"items":' * 100_000 + "{}" + "}" * 100_000),
    "a large divisor": ("json_schema", '{"type": "integer", "multipleOf": 999983}'),
    "an intersection": ("lark", "start: A\nA: /(.*a.{20}b.*)/ & /(.*c.{21}d.*)/ & ~/(.*e.{19}f.*)/ & /(.*g.{23}h.*)/"),
    "a large pattern": ("json_schema", json.dumps({"type": "string", "pattern": "(ab|c)*" * 131_000})),
    "many properties": (
        "json_schema",
        json.dumps({"properties": {f"key{n}": {"type": "string"} for n in range(28000)}}),
    ),
    "doubling": ("lark", "start: T0\n" + "\n".join(f"T{n}: T{n + 1} T{n + 1}" for n in range(60)) + '\nT60: "c"'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_and_the_next_one_compiled(plugin: GrammarPlugin, name: str) -> None:
    """Those that overflow the stack would end this process, if they were not tried elsewhere first."""
    with pytest.raises(llm_os.RequestError) as refused:
        compiled(plugin, *HOSTILE[name])
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    assert not plugin.languages
    assert tokens_of(compiled(plugin, "regex", "a").matcher().allowed([])) == [*b"a"]


def test_nested_repetition_is_no_trouble(plugin: GrammarPlugin) -> None:
    language = compiled(plugin, "json_schema", '{"type": "string", "pattern": "^(a+)+b$"}')
    matcher = language.matcher()
    answer = [*b'"' + b"a" * 2000]
    assert tokens_of(matcher.allowed(answer)) == [*b"ab"]
    assert tokens_of(matcher.allowed([*answer, *b'b"'])) == [END]


def test_a_schema_of_a_megabyte_is_compiled_within_the_limits_of_memory(plugin: GrammarPlugin) -> None:
    values = [f"value {n}" for n in range(62_000)]
    source = json.dumps({"enum": values})
    assert 2**19 < len(source) <= 2**20
    before = resident()
    assert bytes(walk(compiled(plugin, "json_schema", source), 1)).decode()[1:-1] in values
    assert resident() - before < 300 << 20


def test_different_grammars_are_kept_up_to_a_limit(plugin: GrammarPlugin) -> None:
    """`LLM_OS_TEST_SCHEMAS=10000` makes it longer."""
    began = time.monotonic()
    for n in range(SCHEMAS):
        schema = {
            "type": "object",
            "properties": {f"key {n}": {"type": "string", "maxLength": n}},
            "required": [f"key {n}"],
        }
        language = compiled(plugin, "json_schema", json.dumps(schema))
        assert tokens_of(language.matcher().allowed([])) == [*b"{"]
        assert len(plugin.languages) <= MAX_LANGUAGES
        if n == 100:
            before = resident()
    print(
        f"{SCHEMAS} schemas: {time.monotonic() - began:.1f} s, {(resident() - before) >> 20} MiB more than at the 100th"
    )
    assert resident() - before < 64 << 20


def test_large_grammars_are_kept_up_to_a_limit(plugin: GrammarPlugin) -> None:
    for n in range(6):
        compiled(
            plugin, "json_schema", json.dumps({"type": "string", "maxLength": n + 1, "description": "x" * 1_000_000})
        )
        assert sum(len(source) for _, _, source in plugin.languages) <= MAX_KEPT
    assert len(plugin.languages) == 2


def test_what_is_known_is_not_compiled_again_and_models_with_other_tokens_have_their_own(plugin: GrammarPlugin) -> None:
    first = compiled(plugin, "regex", "a+")
    assert compiled(plugin, "regex", "a+") is first
    other = SimImage(name="sim:other", vocab_size=300)
    assert (
        len(plugin.compile_grammar(llm_os.Grammar(kind="regex", source="a+"), other).matcher().allowed([])) * 8 >= 300
    )


def test_an_image_that_tells_no_bytes_is_refused(plugin: GrammarPlugin) -> None:
    class Old:
        name = "old"

    with pytest.raises(llm_os.RequestError, match="old does not tell the bytes of its tokens"):
        plugin.compile_grammar(llm_os.Grammar(kind="regex", source="a"), Old())  # type: ignore[arg-type]


def test_the_process_of_trials_ends_with_the_kernel() -> None:
    plugin = GrammarPlugin()
    compiled(plugin, "regex", "a")
    process = plugin._trial._process  # type: ignore[union-attr]
    assert process is not None and process.poll() is None
    plugin.halting()
    assert process.poll() is not None


def test_importing_the_plugin_imports_no_llguidance() -> None:
    code = "import sys, llm_os.plugins.grammar.plugin; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_trial_is_quick_again_after_one_that_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "LIMIT_S", 0.2)
    asked = trial.Trial()
    with pytest.raises(llm_os.RequestError, match=r"longer than 0\.2 s"):
        asked.ask(*HOSTILE["a large divisor"], engine.LIMITS, engine.OPTIONS)
    assert asked.ask("regex", "a", engine.LIMITS, engine.OPTIONS) == ("", "")
    asked.close()


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
