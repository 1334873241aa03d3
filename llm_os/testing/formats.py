"""The contract of images as tests (`kernel/image.py`): what the kernel relies on in a model of any format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llm_os.kernel.errors import FormatError, RequestError
from llm_os.kernel.image import Image
from llm_os.kernel.request import SamplingDefaults

_TEXTS = ("", "Hello", "naïve 日本語 🙂", "  spaces\n\n\tand tabs ", "<|im_end|></s><eos>", "0123456789" * 20)
_CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
_EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[
        HealthCheck.differing_executors,  # the suite is made to be inherited
        HealthCheck.function_scoped_fixture,
    ],
)


class FormatConformance:
    """Inherit from it, and say what is to be tested:

    class TestMine(llm_os.testing.FormatConformance):
        def open(self): return MyImage(path)
    """

    def open(self) -> Image:
        """The model, opened anew."""
        raise NotImplementedError(f"{type(self).__name__} has to say which image it tests: def open(self)")

    @pytest.fixture(scope="class")
    @classmethod
    def image(cls) -> Iterator[Image]:
        image = cls().open()
        yield image
        image.close()

    def test_it_says_what_it_is(self, image: Image) -> None:
        assert isinstance(image.name, str) and image.name
        assert isinstance(image.architecture, str) and image.architecture
        assert isinstance(image.context_length, int) and image.context_length >= 1
        assert isinstance(image.vocab_size, int) and image.vocab_size >= 1
        assert isinstance(image.sampling_defaults, SamplingDefaults)
        assert image.fresh() is True

    def test_the_tokens_that_end_an_answer_are_of_the_vocabulary(self, image: Image) -> None:
        for ends in (image.turn_end_tokens, image.text_end_tokens):
            assert isinstance(ends, frozenset)
            assert all(0 <= token < image.vocab_size for token in ends)
        assert image.text_end_tokens <= image.turn_end_tokens, "the end of text ends a chat, too"

    @pytest.mark.parametrize("text", _TEXTS)
    @pytest.mark.parametrize("raw", [True, False])
    def test_text_becomes_tokens_of_the_vocabulary(self, image: Image, text: str, raw: bool) -> None:
        tokens = image.encode(text, raw=raw)
        assert isinstance(tokens, list)
        assert all(isinstance(token, int) and 0 <= token < image.vocab_size for token in tokens)
        assert image.encode(text, raw=raw) == tokens

    @pytest.mark.parametrize("text", _TEXTS)
    def test_what_looks_like_a_special_token_stays_text_where_it_is_raw(self, image: Image, text: str) -> None:
        assert not set(image.encode(text, raw=True)[1:]) & image.turn_end_tokens  # the first may begin the text

    def test_decoders_do_not_see_each_other(self, image: Image) -> None:
        streams = [image.encode(text, raw=True) for text in _TEXTS]
        alone = [_decoded(image, tokens) for tokens in streams]
        decoders, shown = [image.decoder() for _ in streams], [""] * len(streams)
        for index in range(max(map(len, streams))):
            for number, tokens in enumerate(streams):
                shown[number] += "".join(decoders[number].push(token) for token in tokens[index : index + 1])
        assert [text + decoder.flush() for text, decoder in zip(shown, decoders, strict=True)] == alone

    def test_text_comes_back_from_its_tokens(self, image: Image) -> None:
        for text in _TEXTS[1:3]:
            assert text in _decoded(image, image.encode(text, raw=True))

    @_EXAMPLES
    @given(st.data())
    def test_any_tokens_become_text_without_half_characters(self, image: Image, data: st.DataObject) -> None:
        tokens = data.draw(st.lists(st.integers(0, image.vocab_size - 1), max_size=20))
        decoder = image.decoder()
        for piece in [*(decoder.push(token) for token in tokens), decoder.flush()]:
            assert isinstance(piece, str)
            piece.encode()  # a lone surrogate is half a character
        assert _decoded(image, tokens) == _decoded(image, tokens)

    def test_a_conversation_becomes_a_prompt_or_is_refused(self, image: Image) -> None:
        wrong: list[list[dict[str, Any]]] = [[], [{"role": "nobody", "content": "x"}], [{"content": 7}], [{}]]
        for messages in (_CHAT, *wrong):
            try:
                text = image.render_chat(messages)
            except (RequestError, FormatError):
                continue
            assert isinstance(text, str)
            assert image.encode(text, raw=False) == image.encode(text, raw=False)

    def test_it_can_be_closed_twice_and_opened_again(self) -> None:
        first = self.open()
        first.close()
        first.close()
        again = self.open()
        assert again.encode("Hello", raw=True)
        again.close()


def _decoded(image: Image, tokens: list[int]) -> str:
    decoder = image.decoder()
    return "".join(decoder.push(token) for token in tokens) + decoder.flush()
