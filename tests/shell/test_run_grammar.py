"""`llm-os run` with a grammar: the answer matches it; what cannot be used is said in one line."""

from __future__ import annotations

import json
import re

import pytest

SCHEMA = '{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": false}'


def test_an_answer_matches_a_schema_from_the_command_line_or_a_file(run, sim, tmp_path):
    given = run("run", "sim:a", "hi", "--json-schema", SCHEMA, "-n", "400", "--seed", "1", *sim)
    assert set(json.loads(given.stdout)) == {"n"}, given.stderr
    file = tmp_path / "schema.json"
    file.write_text(SCHEMA)
    read = run("run", "sim:a", "hi", "--json-schema", str(file), "-n", "400", "--seed", "1", *sim)
    assert read.stdout == given.stdout


def test_an_answer_matches_a_regex_or_a_lark_grammar(run, sim, tmp_path):
    done = run("run", "sim:a", "hi", "--regex", "[ab]{3}(yes|no)", *sim)
    assert re.fullmatch("[ab]{3}(yes|no)\n", done.stdout), done.stderr
    (tmp_path / "g.lark").write_text('start: "x" ("y" | "z") "w"')
    done = run("run", "sim:a", "hi", "--grammar", str(tmp_path / "g.lark"), *sim)
    assert done.stdout in ("xyw\n", "xzw\n"), done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "a", "--json-schema", "{}"], "one grammar; give one of --json-schema and --regex"),
        (["--json-schema", "nowhere.json"], "nowhere.json: the grammar cannot be read: No such file"),
        (["--json-schema", '{"type": '], "the JSON schema is not JSON: Expecting value at line 1, column 10"),
        (["--regex", "(a"], "the regular expression cannot be used: unclosed group, at character 1"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_said_in_one_line(run, sim, options, message):
    done = run("run", "sim:a", "hi", *options, *sim)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_an_answer_that_is_cut_before_it_matches_is_said_to_be(run, sim):
    cut = run("run", "sim:a", "hi", "--regex", "[ab]{30}", "-n", "5", *sim)
    assert cut.returncode == 1 and len(cut.stdout.strip()) == 5
    assert "the answer was cut before it matched its grammar" in cut.stderr and "raise --max-tokens" in cut.stderr
    whole = run("run", "sim:a", "hi", "--regex", "[ab]{30}", "--json", "-n", "5", *sim)
    assert whole.returncode == 0 and json.loads(whole.stdout)["finish_reason"] == "length"
