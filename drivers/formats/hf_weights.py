"""Hugging Face's tensors in the names and conventions of `Weights`, that is, GGUF's. Knows names, not shapes."""

from __future__ import annotations

import re

import numpy as np

from llm_os.drivers.formats.mapped import shown
from llm_os.drivers.formats.safetensors import Tensors
from llm_os.drivers.formats.weights import WeightTensor
from llm_os.kernel.errors import Closed, FormatError

_LAYER = re.compile(r"model\.layers\.(\d{1,4})\.(.+)\.(weight|bias)")
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",  # gate rows first, as in llama.cpp's phi3 files
    "mlp.down_proj": "ffn_down",
}
_GEMMA_PARTS = _PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# Old and new spelling of the decoder inside Gemma3ForConditionalGeneration, and what else is in there.
_NESTED = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_OTHER_MODALITIES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


class HfWeights:
    """`Weights` of a safetensors directory. Views of the files, but for gemma's norms: they come back as 1 + weight."""

    def __init__(self, tensors: Tensors, family: str, file: str) -> None:
        """Raises FormatError when two tensors have the same meaning."""
        self._file = file
        self._plus_one = family == "gemma3"
        self._tensors: Tensors | None = {}
        for name, tensor in tensors.items():
            if (known := _gguf_name(name, _GEMMA_PARTS if self._plus_one else _PARTS)) is None:
                continue
            if known in self._tensors:
                raise FormatError(f"{file}: tensors {shown(self._tensors[known].name)} and {shown(name)} are the same")
            self._tensors[known] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._open()

    def __getitem__(self, name: str) -> WeightTensor:
        tensor = self._open().get(name)
        if tensor is None:
            raise FormatError(f"{self._file}: tensor {name} is missing")
        kind, data = tensor.kind, tensor.data
        if self._plus_one and name.endswith("norm.weight"):
            kind, data = "F32", (tensor.float32() + np.float32(1)).reshape(data.shape[0], -1).view(np.uint8)
        return WeightTensor(name=name, shape=tensor.shape, kind=kind, data=data)

    def names(self) -> tuple[str, ...]:
        return tuple(self._open())

    def kept(self, name: str) -> str | None:
        return None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._open().items()}

    def close(self) -> None:
        """Drops the views; a mapping goes with the last one that a caller still holds. Idempotent."""
        self._tensors = None

    def _open(self) -> Tensors:
        if (tensors := self._tensors) is None:
            raise Closed(f"{self._file} is closed")
        return tensors


def _gguf_name(name: str, parts: dict[str, str]) -> str | None:
    """GGUF's name, the name itself when there is none, or None for what a decoder does not need."""
    if name.startswith(_OTHER_MODALITIES) or name.endswith(".rotary_emb.inv_freq"):
        return None
    for nested, plain in _NESTED:
        if name.startswith(nested):
            name = plain + name.removeprefix(nested)
    if name in _TOP:
        return _TOP[name]
    if (match := _LAYER.fullmatch(name)) and match[2] in parts:
        return f"blk.{int(match[1])}.{parts[match[2]]}.{match[3]}"
    return name
