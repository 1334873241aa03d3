"""Writes a llama GGUF as a CTranslate2 int8 model: `python convert_ctranslate2.py FILE.gguf FOLDER`.

CTranslate2's own converter goes through transformers and torch, and transformers reads this file's tokenizer wrongly.
This goes straight from the tensors, and names each token by its id. GGUF orders the rotary pairs side by side, which
CTranslate2 calls interleaved.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from ctranslate2.converters import utils
from ctranslate2.specs import common_spec, transformer_spec


def convert(file: str, folder: str) -> None:
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    tensors = {each.name: each for each in reader.tensors}

    def weight(name: str) -> Any:
        tensor = tensors[f"{name}.weight"]
        return np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)

    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        fields["llama.block_count"],
        fields["llama.attention.head_count"],
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=True,
        rotary_base=fields["llama.rope.freq_base"],
        num_heads_kv=fields["llama.attention.head_count_kv"],
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weight("token_embd")
    decoder.projection.weight = weight("output" if "output.weight" in tensors else "token_embd")
    decoder.layer_norm.gamma = weight("output_norm")
    for number, layer in enumerate(decoder.layer):
        block = f"blk.{number}"
        layer.self_attention.layer_norm.gamma = weight(f"{block}.attn_norm")
        layer.ffn.layer_norm.gamma = weight(f"{block}.ffn_norm")
        parts = [common_spec.LinearSpec() for _ in "qkv"]
        for part, letter in zip(parts, "qkv", strict=True):
            part.weight = weight(f"{block}.attn_{letter}")
        utils.fuse_linear(layer.self_attention.linear[0], parts)
        layer.self_attention.linear[1].weight = weight(f"{block}.attn_output")
        layer.ffn.linear_0.weight = weight(f"{block}.ffn_gate")
        layer.ffn.linear_0_noact.weight = weight(f"{block}.ffn_up")
        layer.ffn.linear_1.weight = weight(f"{block}.ffn_down")
    spec.register_vocabulary([str(token) for token in range(len(decoder.embeddings.weight))])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.config.layer_norm_epsilon = fields["llama.attention.layer_norm_rms_epsilon"]
    spec.validate()
    spec.optimize(quantization="int8")
    Path(folder).mkdir(parents=True, exist_ok=True)
    spec.save(folder)


if __name__ == "__main__":
    convert(*sys.argv[1:3])
