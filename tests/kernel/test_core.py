"""The core's decisions, seen from outside: events in, actions out. The sim driver tells right tokens from wrong."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from llm_os.drivers.sim import SimImage
from llm_os.kernel import events as ev
from llm_os.kernel.driver import RowError
from llm_os.kernel.errors import DriverError


def test_a_request_is_opened_encoded_loaded_and_answered(machine: Any) -> None:
    m = machine()
    m.submit(1)
    order = []
    while m.pending:
        order.append(type(m.pending[0]).__name__)
        m.complete()
    assert order[:4] == ["Open", "Encode", "Load", "Run"] and set(order[4:]) == {"Run"}
    assert m.end(1) == "length"
    assert m.tokens(1) == m.expected(1)


def test_a_long_prompt_is_prefilled_in_chunks_beside_a_decode(machine: Any) -> None:
    m = machine(batch_tokens=16)
    m.submit(1, "short", sampling={"max_tokens": 30})
    m.until(ev.Run)
    m.submit(2, "x" * 100)
    m.settle()
    fed = [{s.pid: len(s.tokens) for s in run.batch.sequences} for run in m.runs]
    assert all(sum(tokens.values()) <= 16 for tokens in fed)
    together = [tokens for tokens in fed if len(tokens) == 2 and tokens[2] > 1]
    assert len(together) >= 6 and all(tokens == {1: 1, 2: 15} for tokens in together[:6])
    assert m.tokens(1) == m.expected(1) and m.tokens(2) == m.expected(2)


def test_a_page_freed_under_a_running_batch_waits_for_the_batch(machine: Any) -> None:
    m = machine(page_tokens=4)
    m.submit(1, "x" * 30)
    m.until(ev.Run)
    m.post(ev.Kill(1))
    assert m.end(1) == "cancelled"
    assert m.core.memory_info().kv > 0
    m.complete()
    assert m.core.memory_info().kv == 0


@pytest.mark.parametrize("moment", [ev.Open, ev.Encode, ev.Load, ev.Run])
def test_a_cancel_in_any_state_leaves_nothing_behind(machine: Any, moment: type) -> None:
    m = machine()
    m.submit(1)
    m.until(moment)
    m.post(ev.Kill(1), ev.Kill(1))
    m.settle()
    assert m.end(1) == "cancelled" and not m.core.processes
    assert m.core.memory_info().kv == 0
    m.submit(2)
    m.settle()
    assert m.tokens(2) == m.expected(2)


def test_when_pages_run_out_the_newest_gives_way_and_still_answers_the_same(machine: Any) -> None:
    m = machine(memory=6 * 2**20, page_tokens=4, aging_s=1e6)
    for pid in range(1, 7):
        m.submit(pid, f"{pid}" * 20, sampling={"max_tokens": 40})
    m.settle()
    fed = Counter(
        (rows.pid, position)
        for run in m.runs
        for rows in run.batch.sequences
        for position in range(rows.position, rows.position + len(rows.tokens))
    )
    twice = {pid for (pid, _), count in fed.items() if count > 1}
    assert 6 in twice and 1 not in twice, "the newest lost pages, the oldest never"
    for pid in range(1, 7):
        assert m.end(pid) == "length" and m.tokens(pid) == m.expected(pid)


def test_a_lower_nice_is_served_first_and_can_be_changed(machine: Any) -> None:
    m = machine(batch_size=1)
    m.submit(1, sampling={"max_tokens": 4})
    m.until(ev.Run)
    m.submit(2, nice=5)
    m.submit(3, nice=-5)
    m.submit(4, nice=19)
    m.post(ev.Renice(77, 4, -20))
    m.settle()
    first_run = {pid: next(i for i, r in enumerate(m.runs) if r.batch.sequences[0].pid == pid) for pid in (1, 2, 3, 4)}
    assert first_run[4] < first_run[3] < first_run[2]
    assert m.replies[77].error is None


def test_a_fork_shares_pages_until_it_writes(machine: Any) -> None:
    m = machine(page_tokens=4)
    m.submit(1, "z" * 30, sampling={"max_tokens": 20, "temperature": 1.0})
    m.until(ev.Run)
    m.complete()
    m.fork(2, 1)
    m.settle()
    assert m.tokens(1) == m.expected(1)
    child = m.deliveries[2][-1].completion
    shared = len(child.token_ids) - len(m.tokens(2))
    assert shared >= 1 and child.token_ids[:shared] == tuple(m.expected(1)[:shared])
    assert child.token_ids != tuple(m.tokens(1)), "a child with its own seed goes its own way"
    recomputed = sum(len(s.tokens) for run in m.runs for s in run.batch.sequences if s.pid == 2)
    assert recomputed == 20 - shared, "the child feeds only its own new tokens"


def test_a_fork_does_not_share_pages_that_were_added_ahead(machine: Any) -> None:
    m = machine(page_tokens=2, batch_tokens=3)
    m.submit(1, "abcdefghij", sampling={"max_tokens": 12})
    m.until(ev.Run)
    m.fork(2, 1)
    m.complete()  # in the middle of the prompt, and of a page: the next chunk copies it, and adds pages after it
    assert isinstance(m.pending[0], ev.Copy)
    m.fork(3, 1)
    m.fork(4, 2)
    m.settle()
    for pid in (1, 2, 3, 4):
        assert m.end(pid) == "length" and m.tokens(pid) == m.expected(pid)


@pytest.mark.parametrize("killed", [1, 2])
def test_a_kill_reaches_a_fork_that_waits_for_its_parents_batch(machine: Any, killed: int) -> None:
    m = machine()
    m.submit(1, sampling={"max_tokens": 40})
    m.until(ev.Run)
    m.fork(2, 1)
    m.post(ev.Kill(killed))
    m.settle()
    assert m.end(killed) == "cancelled" and m.tokens(killed) == []
    assert m.end(3 - killed) == ("RequestError" if killed == 1 else "length")
    assert m.core.memory_info().kv == 0


@pytest.mark.parametrize("rows", [(), (None,), ("junk",)])
def test_a_driver_that_answers_nonsense_ends_the_request_only(machine: Any, rows: tuple[Any, ...]) -> None:
    m = machine()
    m.submit(1)
    m.until(ev.Run)
    m.mangle = lambda operation, result: rows
    m.complete()
    assert m.end(1) == "DriverError"
    m.mangle = lambda operation, result: result
    m.submit(2)
    m.settle()
    assert m.tokens(2) == m.expected(2)


@pytest.mark.parametrize("tokens", ["text", [1.5], [-1], [None], None])
def test_an_image_that_encodes_nonsense_ends_the_request_only(machine: Any, tokens: Any) -> None:
    m = machine()
    m.submit(1)
    m.until(ev.Encode)
    m.mangle = lambda operation, result: tokens
    m.complete()
    m.mangle = lambda operation, result: result
    m.submit(2)
    m.settle()
    assert m.end(1) == "RequestError" and m.tokens(2) == m.expected(2)


@pytest.mark.parametrize("field", ["kv_bytes_per_token=0", "layer_bytes=-5", "nonsense=1"])
def test_a_model_with_impossible_sizes_is_refused(machine: Any, field: str) -> None:
    m = machine()
    m.submit(1, model=f"sim:a?{field}")
    m.submit(2)
    m.settle()
    assert m.end(1) in ("DriverError", "ModelNotFound") and m.tokens(2) == m.expected(2)


def test_models_take_turns_and_do_not_mix(machine: Any) -> None:
    m = machine()
    m.submit(1, model="sim:a", sampling={"max_tokens": 20})
    m.submit(2, model="sim:b", sampling={"max_tokens": 20})
    m.settle()
    order = [run.batch.model for run in m.runs]
    both = order[order.index("sim:b") :][:20]
    assert both.count("sim:a") >= 9
    assert m.tokens(1) == m.expected(1) and m.tokens(2) == m.expected(2)


def test_a_model_that_cannot_be_opened_fails_its_requests_and_only_those(machine: Any) -> None:
    m = machine()
    m.submit(1, model="sim:a?layers=many")
    m.submit(2)
    m.settle()
    assert m.end(1) == "ModelNotFound" and "layers" in m.error(1)
    assert m.tokens(2) == m.expected(2)


def test_a_model_that_does_not_fit_is_refused_with_the_bytes(machine: Any) -> None:
    m = machine()
    m.submit(1, model="sim:big?layers=100")
    m.submit(2)
    m.settle()
    assert m.end(1) == "Refused" and "needs 100" in m.error(1) and "are free" in m.error(1)
    assert m.end(2) == "length"


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ("", {}, "the prompt is empty"),
        ("x" * 64, {}, "the prompt has 64 tokens, the context of sim:.* is 64"),
        ("x" * 60, {"max_tokens": 5}, "max_tokens is 5; .* at most 4"),
        ("x", {"max_tokens": 2**31 - 1}, "max_tokens is 2147483647; .* at most 63"),
        ("x", {"logit_bias": {257: 1.0}}, "logit_bias has token id 257; the vocabulary of .* ends at 256"),
    ],
)
def test_a_request_that_does_not_fit_its_model_names_the_limit(
    machine: Any, prompt: str, sampling: dict[str, Any], message: str
) -> None:
    m = machine()
    m.submit(1, prompt, "sim:a?context_length=64", sampling={"max_tokens": None, **sampling})
    m.submit(2)
    m.settle()
    with pytest.raises(Exception, match=message):
        raise m.deliveries[1][-1].error
    assert m.end(1) == "RequestError" and m.tokens(2) == m.expected(2)


def test_a_request_that_could_never_get_its_pages_is_refused_at_once(machine: Any) -> None:
    m = machine(memory=6 * 2**20)
    m.submit(1, "x" * 10, sampling={"max_tokens": 2000})
    m.settle()
    assert m.end(1) == "Refused" and "lower max_tokens" in m.error(1)


def test_an_open_ended_answer_ends_with_length_when_memory_is_full(machine: Any) -> None:
    m = machine(memory=6 * 2**20)
    m.submit(1, "x" * 10, sampling={"max_tokens": None})
    m.settle()
    assert m.end(1) == "length" and 50 < len(m.tokens(1)) < 200
    assert m.core.memory_info().kv == 0


def test_a_process_that_needs_all_memory_gets_it_from_other_models_and_then_they_are_served(machine: Any) -> None:
    models = [f"sim:{name}?layer_bytes=65536" for name in "ab"]
    m = machine(
        memory=14 * 65536, page_tokens=1, batch_tokens=2
    )  # five frames for each model, four for KV once both are loaded
    m.submit(1, "p" * 20, models[0], sampling={"max_tokens": 2})
    m.until(ev.Run)
    m.submit(2, "p", models[1], sampling={"max_tokens": 1})
    m.settle()
    assert m.tokens(1) == m.expected(1) and m.tokens(2) == m.expected(2)


def test_a_full_queue_refuses_at_once(machine: Any) -> None:
    m = machine(queue_limit=2)
    for pid in (1, 2, 3):
        m.submit(pid)
    assert m.end(3) == "Refused" and "queue_limit" in m.error(3)
    m.settle()
    assert m.end(1) == m.end(2) == "length"


def test_a_bad_row_ends_its_own_request_only(machine: Any) -> None:
    m = machine()
    m.submit(1)
    m.submit(2)

    def mangle(operation: ev.Operation, result: Any) -> Any:
        if isinstance(operation, ev.Run) and len(operation.batch.sequences) == 2:
            pids = [sequence.pid for sequence in operation.batch.sequences]
            return tuple(RowError("logits are NaN") if pid == 1 else row for pid, row in zip(pids, result, strict=True))
        return result

    m.mangle = mangle
    m.settle()
    assert m.end(1) == "DriverError" and "NaN" in m.error(1)
    assert m.tokens(2) == m.expected(2)


def test_a_failed_batch_ends_its_requests_and_the_next_one_runs(machine: Any) -> None:
    m = machine()
    m.submit(1)
    m.until(ev.Run)

    def mangle(operation: ev.Operation, result: Any) -> Any:
        raise RuntimeError("device lost")

    m.mangle = mangle
    m.complete()
    assert m.end(1) == "DriverError" and "device lost" in m.error(1)
    m.mangle = lambda operation, result: result
    m.submit(2)
    m.settle()
    assert m.tokens(2) == m.expected(2) and m.core.memory_info().kv == 0


def test_a_failed_load_gives_its_memory_back(machine: Any) -> None:
    m = machine()
    m.post(ev.LoadModel(5, "sim:a"))
    m.complete()

    def mangle(operation: ev.Operation, result: Any) -> Any:
        raise DriverError("no")

    m.mangle = mangle
    m.complete()
    assert isinstance(m.replies[5].error, DriverError)
    assert m.core.memory_info().free == m.core.memory_info().total and m.closed_images == 1


def test_unload_is_refused_while_processes_live_and_gives_all_back_after(machine: Any) -> None:
    m = machine()
    m.submit(1)
    m.until(ev.Run)
    m.post(ev.UnloadModel(1, "sim:a"))
    assert "1 live processes" in str(m.replies[1].error)
    m.post(ev.Kill(1), ev.UnloadModel(2, "sim:a"))
    assert 2 not in m.replies, "a batch in flight still names its pages"
    m.settle()
    assert m.replies[2].error is None and m.core.memory_info().free == m.core.memory_info().total
    m.post(ev.UnloadModel(3, "sim:a"))
    assert "not loaded" in str(m.replies[3].error)


def test_a_request_that_meets_its_model_on_the_way_out_waits_for_it_to_come_back(machine: Any) -> None:
    m = machine()
    m.post(ev.LoadModel(1, "sim:a"))
    m.settle()
    m.post(ev.UnloadModel(2, "sim:a"))
    m.submit(3)
    m.post(ev.LoadModel(4, "sim:a"))
    m.settle()
    assert m.replies[2].error is None and m.replies[4].error is None
    assert m.tokens(3) == m.expected(3)


@pytest.mark.parametrize("moment", [ev.Open, ev.Encode, ev.Load, ev.Run])
def test_whoever_comes_while_an_unload_waits_is_served_after_it(machine: Any, moment: type) -> None:
    m = machine()
    m.submit(1)
    m.until(moment)
    m.post(ev.Kill(1), ev.UnloadModel(2, "sim:a"))
    m.submit(3)
    m.post(ev.LoadModel(4, "sim:a"))
    m.settle()
    assert m.replies[2].error is None and m.replies[4].error is None
    assert m.tokens(3) == m.expected(3) and m.closed_images == 0


@pytest.mark.parametrize("moment", [ev.Open, ev.Encode, ev.Load, ev.Run])
def test_halt_at_any_moment_ends_everything(machine: Any, moment: type) -> None:
    m = machine()
    m.submit(1)
    m.post(ev.LoadModel(9, "sim:b"))
    m.until(moment)
    m.post(ev.Halt())
    m.submit(2)
    m.settle()
    assert m.core.halted and m.end(1) == "Closed" and m.end(2) == "Closed"
    assert m.core.memory_info().free == m.core.memory_info().total and 9 in m.replies


def test_stop_strings_end_the_answer_and_are_not_part_of_it(machine: Any) -> None:
    m = machine()
    m.submit(1, sampling={"max_tokens": 60})
    m.settle()
    whole = m.text(1)
    stop = whole[20:23]
    m.submit(2, sampling={"max_tokens": 60, "stop": (stop, "never")})
    m.settle()
    assert m.end(2) == "stop" and m.text(2) == whole[: whole.index(stop)]


def test_tenants_do_not_see_each_others_cells(machine: Any) -> None:
    m = machine()
    m.submit(1, tenant="alice")
    m.submit(2, tenant="bob")
    m.settle()
    assert m.tokens(1) == m.expected(1) and m.tokens(2) == m.expected(2) and m.tokens(1) != m.tokens(2)


def test_an_unloaded_model_keeps_its_image_until_its_file_changes(machine: type[Any]) -> None:
    m = machine()
    m.post(ev.LoadModel(1, "sim:a"))
    m.settle()
    m.post(ev.UnloadModel(2, "sim:a"))
    m.settle()
    assert m.closed_images == 0 and m.core.memory_info().free == m.core.memory_info().total
    m.submit(1)
    assert m.pending[0].image is not None, "it is asked whether it is still what the name stands for"
    m.mangle = lambda operation, result: (
        ev.Opened(SimImage.parse("sim:a"), result.footprint) if isinstance(operation, ev.Open) else result
    )
    m.settle()
    assert m.closed_images == 1 and m.tokens(1) == m.expected(1)


def test_images_of_unloaded_models_are_few(machine: type[Any]) -> None:
    m = machine()
    for number in range(1, 8):
        m.submit(number, model=f"sim:{number}")
        m.settle()
        m.post(ev.UnloadModel(100 + number, f"sim:{number}"))
        m.settle()
    assert [info.name for info in m.core.residency.infos()] == ["sim:4", "sim:5", "sim:6", "sim:7"]
    assert m.closed_images == 3


@pytest.mark.parametrize("killed", [False, True])
def test_a_page_whose_copy_failed_is_not_kept_for_others(machine: type[Any], killed: bool) -> None:
    def broken(model: str, moves: Any) -> Any:
        raise MemoryError

    m = machine(page_tokens=4)
    m.submit(1, "six pages of four, and two", sampling={"max_tokens": 6})
    m.until(ev.Run)
    m.complete()
    m.fork(2, 1)
    m.until(ev.Copy)
    if killed:
        m.post(ev.Kill(2), ev.Kill(1))
    copy, m.driver.copy = m.driver.copy, broken
    m.settle()
    m.driver.copy = copy
    m.submit(3, "six pages of four, and two", sampling={"max_tokens": 20})
    m.settle()
    assert m.tokens(3) == m.expected(3)
