"""`llm-os bench`: its figures, what it leaves out, and an end that is clean. No test here is about speed."""

from __future__ import annotations

import json

import pytest

import llm_os
from llm_os.shell.measure import Subject, start

SMALL = ("--batch", "1,3", "--context", "40,90", "--prompt-tokens", "50,100", "--tokens", "5", "--rounds", "2")
CONFIG = llm_os.Config(driver="sim", memory="64MiB")


def test_the_table_has_a_row_for_each_batch_and_a_column_for_each_context(run, sim):
    done = run("bench", "sim:a", *SMALL, *sim)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    titles = {row[0]: index for index, row in enumerate(rows) if row and row[0].isupper()}
    assert list(titles) == ["LOAD", "PROMPT", "BATCH"]
    assert [row[0] for row in rows[titles["LOAD"] + 1 :][:2]] == ["first", "second"]
    assert [row[0] for row in rows[titles["PROMPT"] + 1 :][:2]] == ["50", "100"]
    assert rows[titles["BATCH"]] == ["BATCH", "AFTER", "40", "SPREAD", "AFTER", "90", "SPREAD"]
    assert [(row[0], len(row)) for row in rows[titles["BATCH"] + 1 :][:2]] == [("1", 5), ("3", 5)]
    assert done.stdout.startswith("sim:a, fast, speculation off\nsim: simulated\n")


def test_json_is_one_object_with_every_round(run, sim):
    done = run("bench", "sim:a", *SMALL, *sim, "--json", "--precision", "exact", "--speculation", "always")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["model"], report["precision"], report["speculation"]) == ("sim:a", "exact", "always")
    assert report["device"]["driver"] == "sim"
    assert len(report["loads"]) == 2 and all(load["load_s"] > 0 for load in report["loads"])
    assert [each["tokens"] for each in report["prompts"]] == [50, 100]
    assert [(each["context"], each["batch"]) for each in report["answers"]] == [(40, 1), (40, 3), (90, 1), (90, 3)]
    assert all(len(each["rounds_s"]) == 2 and each["tok_s"] > 0 for each in report["prompts"])
    assert all(len(each["rounds_tok_s"]) == 2 and each["tok_s"] > 0 for each in report["answers"])
    assert report["memory"]["weights_bytes"] >= 4 << 20
    assert report["memory"]["peak_bytes"] >= report["memory"]["peak_bytes_one_answer"] > 1 << 20
    assert report["left_out"] == []


def test_quick_is_less_of_what_was_not_asked_for(run, sim):
    report = json.loads(run("bench", "sim:a", "--quick", "--context", "30", "--json", *sim).stdout)
    assert [(each["context"], each["batch"]) for each in report["answers"]] == [(30, 1), (30, 8)]
    assert [each["tokens"] for each in report["prompts"]] == [512]
    assert all(len(each["rounds_tok_s"]) == 1 for each in report["answers"])


def test_what_does_not_fit_the_model_is_left_out_and_named(run, sim):
    done = run("bench", "sim:a?context_length=600", "--batch", "1", "--tokens", "5", "--rounds", "1", "--json", *sim)
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert {each["context"] for each in report["answers"]} == {128}
    assert [each["tokens"] for each in report["prompts"]] == [512]
    assert len(report["left_out"]) == 2 and done.stderr.count("\n") == 2
    assert "--context 1024" in done.stderr and "--prompt-tokens 2048" in done.stderr and "600" in done.stderr


def test_what_does_not_fit_the_memory_is_left_out_and_named(run):
    machine = ("--driver", "sim", "--memory", "16MiB")
    done = run("bench", "sim:a", "--context", "40", "--prompt-tokens", "50", "--tokens", "5", "--rounds", "1", *machine)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("llm-os: batch 4, context 40 needs KV for ") and done.stderr.count("\n") == 1
    done = run("bench", "sim:a", "--prompt-tokens", "50", "--tokens", "5", "--rounds", "1", "--json", *machine)
    report = json.loads(done.stdout)
    assert [(each["context"], each["batch"]) for each in report["answers"]] == [(128, 1)]
    assert len(report["left_out"]) == 9


SIM = ("--driver", "sim", "--memory", "64MiB")
WRONG = {
    "batch that is no number": (("--batch", "many"), 2, ("--batch is 'many'", "1,8")),
    "batch with a gap": (("--batch", "1,,8"), 2, ("--batch is '1,,8'",)),
    "batch of none": (("--batch", "0"), 2, ("--batch is 0", "1 to 64")),
    "batch beyond a pass": (("--batch", "8,65"), 2, ("--batch is 65", "1 to 64")),
    "negative context": (("--context", "-5"), 2, ("--context",)),
    "context without end": (("--context", "9" * 40), 2, ("--context is '999",)),
    "too many contexts": (("--context", ",".join("123456789" * 2)), 2, ("at most 16",)),
    "context beyond the model's": (("--context", "100,4096"), 2, ("--context 4096", "is 4096", "at most 3968")),
    "prompt beyond the model's": (("--prompt-tokens", "4096"), 2, ("--prompt-tokens 4096", "at most 4095")),
    "no tokens": (("--tokens", "0"), 2, ("--tokens is 0",)),
    "no rounds": (("--rounds", "0"), 2, ("--rounds is 0",)),
    "batch beyond the memory": (("--batch", "64"), 1, ("batch 64, context 128", "raise --memory")),
    "prompt beyond the memory": (("--prompt-tokens", "3900"), 1, ("a prompt of 3900", "raise --memory")),
    "unknown precision": (("--precision", "best"), 2, ("best", "exact")),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_gets_one_line_that_names_it(run, case):
    arguments, code, named = WRONG[case]
    done = run("bench", "sim:a", *SIM, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("llm-os: ") and done.stderr.count("\n") == 1, done.stderr
    for text in named:
        assert text in done.stderr


@pytest.mark.parametrize(
    ("model", "memory", "named"), [("smolm2", "64MiB", "'smolm2'"), ("sim:a", "4MiB", "raise mem")]
)
def test_a_model_that_cannot_be_had_gets_one_line_that_says_why(run, model, memory, named):
    done = run("bench", model, "--driver", "sim", "--memory", memory)
    assert (done.returncode, done.stdout) == (1, "")
    assert named in done.stderr and done.stderr.count("\n") == 1


def test_answers_that_cannot_all_be_kept_going_are_refused(run, sim):
    """The sim driver takes no logit bias."""
    done = run("bench", "sim:a?end_after=2", "--quick", *sim)
    assert (done.returncode, done.stdout) == (1, "")
    assert "at the same time" in done.stderr and done.stderr.count("\n") == 1


def test_answers_are_kept_from_ending_once_one_of_them_has_ended(monkeypatch):
    biases: list[dict[int, float]] = []
    model = "sim:a?end_after=2"
    kernel, _ = start(CONFIG, model)
    stream = llm_os.Kernel.stream

    def watched(kernel: llm_os.Kernel, request: llm_os.Request) -> llm_os.Stream:
        biases.append(request.sampling.logit_bias)
        return stream(kernel, request)

    monkeypatch.setattr(llm_os.Kernel, "stream", watched)
    with kernel:
        subject = Subject(kernel, CONFIG, llm_os.open_image(model), model)
        with pytest.raises(llm_os.Refused, match="1 answers of sim:a"):
            subject.decode([subject.prompt(20)], 100)
    assert biases == [{}, {256: -1000.0}]


def test_ctrl_c_ends_it_cleanly_while_it_shows_how_far_it_is(terminal, sim):
    program = terminal("bench", "sim:a", "--rounds", "1000", *sim)
    program.read_until("of 1000")
    program.type("\x03")
    code, rest = program.end()
    assert code == 130
    assert "Traceback" not in rest and "Error" not in rest


def test_prompts_have_the_length_asked_for_and_begin_differently():
    image = llm_os.open_image("sim:a")
    kernel, _ = start(CONFIG, "sim:a")
    with kernel:
        subject = Subject(kernel, CONFIG, image, "sim:a")
        prompts = [subject.prompt(length) for length in (1, 40, 40, 1000)]
    assert [len(prompt) for prompt in prompts] == [1, 40, 40, 1000]
    assert len({prompt[0] for prompt in prompts}) == 4


def test_prompts_that_were_read_are_there_and_others_are_not(monkeypatch):
    """Reading is not timed with answers, and no prompt whose reading is timed has been read before."""
    seen: list[tuple[int, int]] = []
    kernel, _ = start(CONFIG, "sim:a")
    result = llm_os.Stream.result

    def watched(stream: llm_os.Stream) -> llm_os.Completion:
        completion = result(stream)
        seen.append((completion.usage.prompt_tokens, completion.usage.cached_tokens))
        return completion

    monkeypatch.setattr(llm_os.Stream, "result", watched)
    with kernel:
        subject = Subject(kernel, CONFIG, llm_os.open_image("sim:a"), "sim:a")
        prompts = [subject.prompt(200) for _ in range(2)]
        subject.read(prompts)
        subject.prefill(200)
        assert seen == [(200, 0)] * 3
        subject.read(prompts)
        assert all(total == 200 and cached >= 100 for total, cached in seen[3:])


def test_a_real_model_is_measured(run, smollm2):
    lengths = ("--batch", "1,2", "--context", "8", "--prompt-tokens", "16", "--tokens", "2", "--rounds", "1")
    done = run("bench", str(smollm2), *lengths, "--driver", "cpu", "--memory", "2GiB", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert [each["batch"] for each in report["answers"]] == [1, 2]
    assert all(each["tok_s"] > 0 for each in (*report["answers"], *report["prompts"]))
    assert report["device"]["driver"] == "cpu" and "torch" in report["device"]["details"]
    assert report["memory"]["peak_bytes"] > report["memory"]["weights_bytes"] > 1 << 20
