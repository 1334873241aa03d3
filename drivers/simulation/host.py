"""The host's part of the work, as a host with broken plugins does it: opening images, making tokens of text.

A plugin's hook raises, takes for ever, or answers something of the wrong type: `open_image` no image, or one whose
fields, decoder or template are not what they should be; `encode` no list of token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import structs

from llm_os.drivers.sim import SimDecoder, SimImage
from llm_os.drivers.simulation.chooser import Chooser
from llm_os.kernel import events as ev
from llm_os.kernel.driver import Driver
from llm_os.kernel.loop import encode

TAMPERED = ("context", "vocabulary", "ends", "decoder", "push raises", "push type", "flush raises", "flush type")
_NO_TOKENS: tuple[Any, ...] = (None, "text", 7, [1.5], ["a"], [-1], [10**30], {}, [None], (1, 2), b"bytes", [[]])


class TamperedImage(SimImage, frozen=True, kw_only=True):
    """An image of a plugin that does not keep its promises: `tampered` says which one."""

    tampered: str = ""

    @property
    def text_end_tokens(self) -> frozenset[int]:
        return None if self.tampered == "ends" else super().text_end_tokens  # type: ignore[return-value]

    def decoder(self) -> Any:
        return None if self.tampered == "decoder" else TamperedDecoder(self.tampered)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Any:
        return None


class TamperedDecoder(SimDecoder):
    def __init__(self, tampered: str) -> None:
        super().__init__()
        self._tampered = tampered

    def push(self, token_id: int) -> Any:
        if self._tampered == "push raises":
            raise ZeroDivisionError("a plugin's decoder (simulated)")
        return 7 if self._tampered == "push type" else super().push(token_id)

    def flush(self) -> Any:
        if self._tampered == "flush raises":
            raise ZeroDivisionError("a plugin's decoder (simulated)")
        return b"bytes" if self._tampered == "flush type" else super().flush()


def open_image(
    operation: ev.Open,
    driver: Driver,
    batch_tokens: int,
    fault: str | None,
    chooser: Chooser,
    images: Mapping[str, SimImage],
) -> ev.Opened:
    """`images` are the models as they are; what is opened is a new one, or the one that the operation names."""
    if fault == "plugin_raise":
        raise ZeroDivisionError("a plugin's open_image (simulated)")
    image: Any = operation.image
    if image is None or (isinstance(image, TamperedImage) and fault is None):
        known = images.get(operation.model)
        image = SimImage.parse(operation.model) if known is None else structs.replace(known)
    if fault == "file_changed":  # other weights: the same text has other KV, of another size
        image = structs.replace(
            image, name=f"{image.name}'", kv_bytes_per_token=chooser.pick((image.kv_bytes_per_token, 96))
        )
    if fault == "plugin_type":
        what = chooser.below(len(TAMPERED) + 1)
        if what == len(TAMPERED):
            image = "no image"
        else:
            fields: dict[str, Any] = {name: getattr(image, name) for name in SimImage.__struct_fields__}
            wrong: dict[str, dict[str, Any]] = {
                "context": {"context_length": "many"},
                "vocabulary": {"vocab_size": None},
            }
            image = TamperedImage(**{**fields, **wrong.get(TAMPERED[what], {})}, tampered=TAMPERED[what])
    return ev.Opened(image, driver.footprint(image, batch_tokens))


def tokens_of(operation: ev.Encode, fault: str | None, chooser: Chooser) -> Any:
    if fault == "plugin_raise":
        raise ZeroDivisionError("a plugin's tokenizer (simulated)")
    if fault == "plugin_type":
        return chooser.pick(_NO_TOKENS)
    return encode(operation)
