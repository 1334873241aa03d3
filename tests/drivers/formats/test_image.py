"""Opening models: from both formats comes the same kind of image, and what is no model says so in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_os.drivers.formats.image import ModelImage, open_image
from llm_os.drivers.formats.shapes import tensor_shapes
from llm_os.kernel.errors import Closed, FormatError, ModelNotFound, RequestError, Unsupported
from llm_os.kernel.image import Image
from llm_os.kernel.request import SamplingDefaults

WriteGguf = Callable[..., Path]
Edit = Callable[..., None]
CHAT = [{"role": "user", "content": "hello"}]
RENDERED = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(params=["gguf", "safetensors"])
def image(request: pytest.FixtureRequest) -> ModelImage:
    if request.param == "gguf":
        return open_image(request.getfixturevalue("write_gguf")())
    return open_image(request.getfixturevalue("model_directory"))


def test_both_formats_give_a_whole_image(image: ModelImage) -> None:
    as_kernel_sees_it: Image = image
    assert as_kernel_sees_it.architecture == "llama"
    assert (image.context_length, image.vocab_size) == (64, 261)
    assert image.name == image.path.name
    assert image.render_chat(CHAT) == RENDERED
    assert image.sampling_defaults == SamplingDefaults(temperature=0.5, top_k=40)
    tokens = image.encode(RENDERED, raw=False)
    decoder = image.decoder()
    assert len(image.encode("hello", raw=True)) == 3  # hel l o
    assert "hello" in "".join(map(decoder.push, tokens)) + decoder.flush()
    assert image.encode("<|im_end|>", raw=False)[0] in image.turn_end_tokens
    for name, shape in tensor_shapes(image.hyperparameters).items():
        assert image.weights[name].float32().shape == shape


def test_a_closed_image_says_so_by_its_name(image: ModelImage) -> None:
    image.close()
    image.close()
    for call in (
        lambda: image.encode("x", raw=True),
        lambda: image.render_chat(CHAT),
        lambda: image.decoder(),
        lambda: image.weights,
    ):
        with pytest.raises(Closed, match=image.name.replace(".", r"\.")):
            call()


def test_an_image_is_called_what_the_caller_says(write_gguf: WriteGguf) -> None:
    assert open_image(write_gguf(), "tiny:latest").name == "tiny:latest"


def test_smollm2_opens_whole(smollm2: Path) -> None:
    image = open_image(smollm2)
    assert (image.architecture, image.context_length, image.vocab_size) == ("llama", 8192, 49152)
    assert 2 in image.turn_end_tokens
    assert image.render_chat(CHAT).endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    values = image.weights["blk.29.attn_q.weight"].float32()
    assert values.shape == (576, 576)
    assert np.isfinite(values).all()


def test_without_a_template_chat_is_refused_with_the_way_out(write_gguf: WriteGguf) -> None:
    image = open_image(write_gguf(metadata={"tokenizer.chat_template": None}))
    with pytest.raises(RequestError, match=r"tiny\.gguf has no chat template.*--raw"):
        image.render_chat(CHAT)
    assert image.encode("hello", raw=True)


def test_a_broken_template_leaves_raw_text_working(write_gguf: WriteGguf) -> None:
    image = open_image(write_gguf(metadata={"tokenizer.chat_template": "{% for %}"}))
    with pytest.raises(FormatError, match=r"tiny\.gguf"):
        image.render_chat(CHAT)
    assert image.encode("hello", raw=True)


def test_a_token_beyond_the_embedding_is_refused(model_directory: Path, write_gguf: WriteGguf) -> None:
    embedding = np.zeros((260, 32), np.float32)
    image = open_image(write_gguf(tensors={"token_embd.weight": embedding, "output.weight": embedding}))
    assert image.encode("hello", raw=True)
    with pytest.raises(RequestError, match=r"token 260, but tiny\.gguf knows only the 260 below it"):
        image.encode("<|im_end|>", raw=False)


@pytest.mark.parametrize(
    ("setting", "file_text", "expected"),
    [
        (TEMPLATE := "{{ messages[0].content }}!", None, "hello!"),
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}], None, "hello!"),
        ("from the settings", "{{ messages[0].content }}?", "hello?"),
    ],
)
def test_a_directorys_template_is_found(
    model_directory: Path, edit_json: Edit, setting: Any, file_text: str | None, expected: str
) -> None:
    edit_json(model_directory / "tokenizer_config.json", chat_template=setting)
    if file_text is not None:
        (model_directory / "chat_template.jinja").write_text(file_text)
    assert open_image(model_directory).render_chat(CHAT) == expected


@pytest.mark.parametrize("setting", [..., None, [], [{"name": ["x"]}], ["x"], [{"name": "other", "template": "x"}]])
def test_a_directory_without_a_template_refuses_chat(model_directory: Path, edit_json: Edit, setting: Any) -> None:
    edit_json(model_directory / "tokenizer_config.json", chat_template=setting)
    with pytest.raises(RequestError, match="tiny has no chat template"):
        open_image(model_directory).render_chat(CHAT)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"temperature": 0.5}, SamplingDefaults(temperature=0.5)),
        ({"do_sample": False, "temperature": 0.5}, SamplingDefaults(temperature=0.0)),
        (
            {"top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1},
            SamplingDefaults(top_p=0.9, min_p=0.1, repetition_penalty=1.1),
        ),
        ({"top_k": -1}, SamplingDefaults(top_k=0)),
    ],
)
def test_the_authors_recommendation_is_read(
    model_directory: Path, edit_json: Edit, generation: dict[str, Any], expected: SamplingDefaults
) -> None:
    edit_json(model_directory / "generation_config.json", do_sample=..., temperature=..., top_k=...)
    edit_json(model_directory / "generation_config.json", **generation)
    assert open_image(model_directory).sampling_defaults == expected


def test_a_stored_head_is_ignored_where_it_is_tied(model_directory: Path, edit_json: Edit) -> None:
    edit_json(model_directory / "config.json", tie_word_embeddings=True)
    assert open_image(model_directory).hyperparameters.tied_embeddings


def test_one_part_of_a_split_model_is_unsupported(write_gguf: WriteGguf) -> None:
    with pytest.raises(Unsupported, match="one part of a split model"):
        open_image(write_gguf(metadata={"split.count": 2}))


def test_what_is_no_model_is_told_apart(tmp_path: Path, model_directory: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    empty = tmp_path / "empty.gguf"
    empty.touch()
    bare = tmp_path / "bare"
    bare.mkdir()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    cases: list[tuple[Path, type[Exception], str]] = [
        (tmp_path / "none", ModelNotFound, "No such file"),
        (tmp_path / "a\0b", ModelNotFound, "null byte"),
        (text, FormatError, "neither a GGUF file nor a directory with config.json"),
        (empty, FormatError, "the file is empty"),
        (pipe, FormatError, "not a regular file"),
        (bare, FormatError, "the directory has no config.json"),
        (model_directory / "model.safetensors", FormatError, "give the directory"),
        (model_directory / "config.json", FormatError, "neither a GGUF file"),
    ]
    for path, error, problem in cases:
        with pytest.raises(error, match=problem) as caught:
            open_image(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FormatError, match=r"no config\.json; give one of its files, such as empty\.gguf"):
        open_image(tmp_path)


def test_a_missing_tokenizer_is_named(model_directory: Path, write_gguf: WriteGguf) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.ggml\.model"):
        open_image(write_gguf(metadata={"tokenizer.ggml.model": None}))
    (model_directory / "tokenizer.json").unlink()
    with pytest.raises((FormatError, Unsupported), match=r"tokenizer\.json"):
        open_image(model_directory)
