"""The contract of passes as tests (`kernel/compression.py`): weights may change, the model's words may not."""

from __future__ import annotations

from contextlib import closing
from typing import Any, ClassVar, cast

import pytest

from llm_os.kernel.compression import Pass
from llm_os.kernel.errors import Unsupported
from llm_os.kernel.image import Image

_SAME = (
    "architecture", "context_length", "vocab_size", "turn_end_tokens", "text_end_tokens", "sampling_defaults"
)  # fmt: skip
_TEXT = "Hello, naïve 日本語 🙂"


class PassConformance:
    """Inherit from it, and say what is to be tested:

    class TestMine(llm_os.testing.PassConformance):
        model = "smollm2:135m"
        def make(self): return MyPass()

    `model` is one that the pass can change, pulled before.
    """

    model: ClassVar[str] = "smollm2:135m"

    def make(self) -> Pass:
        """A new one."""
        raise NotImplementedError(f"{type(self).__name__} has to say which pass it tests: def make(self)")

    def image(self) -> Image:
        """`model`, opened anew."""
        import llm_os

        return llm_os.open_image(self.model)

    def test_what_is_said_stays_as_it_is(self) -> None:
        with closing(self.image()) as image, closing(self.make().apply(self.image())) as changed:
            for field in _SAME:
                assert getattr(changed, field) == getattr(image, field), field
            for raw in (True, False):
                assert changed.encode(_TEXT, raw=raw) == image.encode(_TEXT, raw=raw)
            tokens = image.encode(_TEXT, raw=True)
            texts = ["".join(map(each.decoder().push, tokens)) for each in (image, changed)]
            assert texts[0] == texts[1]
            chat = [{"role": "user", "content": "Hi"}]
            assert changed.render_chat(chat) == image.render_chat(chat)

    def test_tensors_keep_their_names_and_shapes(self) -> None:
        with closing(self.image()) as image, closing(self.make().apply(self.image())) as changed:
            before, after = (getattr(each, "weights", None) for each in (image, changed))
            if before is None:
                pytest.skip(f"{self.model} has no weights to look at")
            assert after is not None and after.names() == before.names()
            for name in before.names()[:12]:  # of the first layer, with whatever comes before it
                assert after[name].shape == before[name].shape, name

    def test_the_changed_model_closes_the_one_that_it_took_over(self) -> None:
        spied = _Spied(self.image())
        changed = self.make().apply(cast(Image, spied))
        assert spied.closed == 0, "the pass has it until the kernel closes what came of it"
        changed.close()
        changed.close()
        assert spied.closed >= 1

    def test_one_changed_model_does_not_end_with_another(self) -> None:
        compression = self.make()
        first, second = compression.apply(self.image()), compression.apply(self.image())
        first.close()
        with closing(second):
            assert second.encode("Hello", raw=True)
            assert second.fresh() is True

    def test_a_model_that_it_cannot_change_is_refused_in_our_words(self) -> None:
        import llm_os

        try:
            changed = self.make().apply(llm_os.open_image("sim:a"))  # it has no weights
        except Unsupported as error:
            assert "\n" not in str(error)
        else:
            changed.close()


class _Spied:
    """An image whose end is noticed."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.closed = 0

    def close(self) -> None:
        self.closed += 1
        self._image.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image, name)
