"""The contract of filters as tests (`kernel/filters.py`): streaming-safe, repeatable, one answer blind to another."""

from __future__ import annotations

from typing import ClassVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec import structs

from llm_os.kernel.errors import RequestError
from llm_os.kernel.filters import Filter, TextFilter
from llm_os.kernel.request import Request

CHANGEABLE = ("messages", "prompt", "tools")
_EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.differing_executors],  # the suite is made to be inherited
)


class FilterConformance:
    """Inherit from it, and say what is to be tested:

    class TestMine(llm_os.testing.FilterConformance):
        def make(self): return MyFilter()

    `cases` are requests and answers that give the filter something to do.
    """

    cases: ClassVar[tuple[tuple[Request, str], ...]] = (
        (Request(model="sim:a", prompt="What is it called?"), "It is called llm-os: naïve, 日本語, 🙂.\n\nThe end."),
        (
            Request(model="sim:a", messages=[{"role": "user", "content": "My number is 030 1234567, call me."}]),
            "I shall call 030 1234567.",
        ),
        (Request(model="sim:a", prompt=[1, 2, 3]), "x" * 300),
        (Request(model="sim:a", messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]), ""),
    )

    def make(self) -> Filter:
        """A new one, as after a restart."""
        raise NotImplementedError(f"{type(self).__name__} has to say which filter it tests: def make(self)")

    def test_a_request_is_taken_refused_or_let_be(self) -> None:
        for request, _ in self.cases:
            changed, text = self._open(self.make(), request)
            assert text is None or (callable(text.push) and callable(text.flush))
            for field in request.__struct_fields__:
                if field not in CHANGEABLE:
                    assert getattr(changed, field) == getattr(request, field), f"{field} is not a filter's to change"

    def test_a_request_is_not_changed_in_place(self) -> None:
        for request, _ in self.cases:
            before = repr(request)
            self._open(self.make(), request)
            assert repr(request) == before

    def test_the_same_request_opens_the_same_again(self) -> None:
        """For a fork, and for a session that is restored after a restart."""
        for request, answer in self.cases:
            first, again, later = self.make(), self.make(), self.make()
            self._open(first, request)
            opened = [self._open(filter, request) for filter in (first, again, later)]
            assert all(changed == opened[0][0] for changed, _ in opened)
            assert len({_through(text, [answer]) for _, text in opened}) == 1

    @_EXAMPLES
    @given(st.data())
    def test_an_answer_is_the_same_whatever_its_cuts(self, data: st.DataObject) -> None:
        request, answer = data.draw(st.sampled_from(self.cases))
        extra = st.text(st.sampled_from(sorted({*answer, *" \n<>[]{}@.0aé🙂"})), max_size=12)
        place = data.draw(st.integers(0, len(answer)))
        answer = answer[:place] + data.draw(extra) + answer[place:]
        filter = self.make()
        whole = _through(self._open(filter, request)[1], [answer])
        places = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=8)))
        pieces = [answer[i:j] for i, j in zip([0, *places], [*places, len(answer)], strict=True)]
        for cut in (pieces, list(answer)):
            assert _through(self._open(filter, request)[1], cut) == whole, f"cut as {cut}"

    def test_answers_at_the_same_time_do_not_see_each_other(self) -> None:
        filter = self.make()
        alone = [_through(self._open(filter, request)[1], list(answer)) for request, answer in self.cases]
        texts = [self._open(filter, request)[1] for request, _ in self.cases]
        shown = [""] * len(texts)
        for index in range(max(len(answer) for _, answer in self.cases)):
            for number, ((_, answer), text) in enumerate(zip(self.cases, texts, strict=True)):
                piece = answer[index : index + 1]
                shown[number] += piece if text is None else text.push(piece)
        assert [so_far + (text.flush() if text else "") for so_far, text in zip(shown, texts, strict=True)] == alone

    def _open(self, filter: Filter, request: Request) -> tuple[Request, TextFilter | None]:
        request = structs.replace(request)
        try:
            opened = filter.open(request)
        except RequestError:
            return request, None
        if opened is None:
            return request, None
        assert isinstance(opened, tuple) and len(opened) == 2, "open returns (Request, TextFilter or None), or None"
        assert isinstance(opened[0], Request), f"open gave {type(opened[0]).__name__} for a Request"
        return opened


def _through(text: TextFilter | None, pieces: list[str]) -> str:
    if text is None:
        return "".join(pieces)
    shown = [*(text.push(piece) for piece in pieces), text.flush()]
    assert all(isinstance(each, str) for each in shown), "push and flush return str"
    return "".join(shown)
