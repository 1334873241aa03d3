"""Passes' weights: made when they are read, checked, and held in the types that were asked for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from llm_os.drivers.formats.changed import change_weights, outline, stored, weight_matrices
from llm_os.drivers.formats.weights import WeightTensor
from llm_os.kernel.errors import Closed, PluginError, Unsupported

DOWN, NORM = "blk.0.ffn_down.weight", "output_norm.weight"


class Recorded:
    """Weights that note which tensors were read."""

    def __init__(self):
        numbers = np.random.default_rng(0)
        shapes = {"token_embd.weight": (96, 64), NORM: (64,), DOWN: (64, 128)}
        self.arrays = {name: numbers.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        self.read = []

    def __contains__(self, name):
        return name in self.arrays

    def __getitem__(self, name):
        self.read.append(name)
        array = self.arrays[name]
        return WeightTensor(
            name=name, shape=array.shape, kind="F32", data=array.reshape(-1, array.shape[-1]).view(np.uint8)
        )

    def names(self):
        return tuple(self.arrays)

    def kept(self, name):
        return None

    def close(self):
        pass


@pytest.fixture
def image():
    closed = []
    image = SimpleNamespace(
        name="tiny",
        context_length=77,
        weights=Recorded(),
        hyperparameters=SimpleNamespace(tied_embeddings=True),
        closed=closed,
    )
    image.close = lambda: closed.append(True)
    return image


def test_a_change_is_made_when_a_tensor_is_read_and_not_before(image):
    calls = []

    def double(tensor):
        calls.append(tensor.name)
        return tensor.replaced(tensor.float32() * 2)

    changed = change_weights(image, double)
    assert calls == []
    assert np.array_equal(changed.weights[DOWN].float32(), image.weights.arrays[DOWN] * 2)
    assert calls == [DOWN]
    assert changed.context_length == 77
    assert changed.weights.kept(DOWN) is None


def test_a_matrix_comes_in_the_type_that_was_asked_for(image):
    changed = change_weights(image, kept={DOWN: "Q8_0"})
    assert changed.weights.kept(DOWN) == "Q8_0"
    tensor = changed.weights[DOWN]
    assert (tensor.kind, tensor.data.shape) == ("Q8_0", (64, 4 * 34))
    assert changed.weights[NORM].kind == "F32"


def test_a_head_that_is_the_embedding_can_be_held_apart_from_it(image):
    assert weight_matrices(image) == {DOWN: (64, 128), "output.weight": (96, 64)}
    changed = change_weights(image, kept={"output.weight": "Q8_0"})
    assert changed.weights["output.weight"].kind == "Q8_0"
    assert changed.weights["token_embd.weight"].kind == "F32"
    assert "output.weight" in changed.weights
    assert "output.weight" not in image.weights
    assert changed.weights.names() == image.weights.names()


def test_a_type_that_an_earlier_pass_asked_for_stays_after_a_later_change(image):
    quantized = change_weights(image, kept={DOWN: "Q8_0", "output.weight": "Q8_0"})
    pruned = change_weights(quantized, lambda tensor: tensor.replaced(tensor.float32() * 0))
    assert pruned.weights[DOWN].kind == "Q8_0"
    assert not pruned.weights[DOWN].float32().any()
    assert not pruned.weights["output.weight"].float32().any()
    again = change_weights(pruned, kept={DOWN: "Q4_1"})
    assert again.weights[DOWN].kind == "Q4_1"
    assert stored(again.weights) is image.weights


def test_types_and_shapes_are_known_without_the_work_of_a_pass(image, monkeypatch):
    def outlines(changed):
        return [outline(changed.weights, name) for name in (DOWN, "output.weight", NORM)]

    kept = change_weights(image, kept={DOWN: "Q4_1", "output.weight": "Q8_0"})
    doubled = change_weights(kept, lambda tensor: tensor.replaced(tensor.float32() * 2))
    expected = [
        (tensor.kind, tensor.shape) for tensor in (kept.weights[name] for name in (DOWN, "output.weight", NORM))
    ]
    monkeypatch.setattr(WeightTensor, "quantized", None)
    assert outlines(kept) == outlines(doubled) == expected
    plain = change_weights(image, lambda tensor: tensor.replaced(tensor.float32()))
    assert outline(plain.weights, DOWN) == outline(image.weights, DOWN) == ("F32", (64, 128))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: 1 / 0, "ZeroDivisionError"),
        (lambda tensor: None, "made NoneType"),
        (lambda tensor: tensor.replaced(tensor.float32()[:1]), r"made \(1, 128\) .* is \(64, 128\)"),
    ],
)
def test_a_change_that_fails_names_the_model_and_the_tensor(image, change, message):
    changed = change_weights(image, change)
    with pytest.raises(PluginError, match=rf"tiny: .*{message}"):
        changed.weights[DOWN]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({NORM: "Q8_0"}, "no matrix that can be held"),
        ({"token_embd.weight": "Q8_0"}, "no matrix that can be held"),
        ({"blk.9.attn_q.weight": "Q8_0"}, "no matrix that can be held"),
        ({DOWN: "Q6_K"}, "cannot be held as Q6_K; they can as Q8_0, Q4_1"),
        ({DOWN: "INT8_ROW"}, "cannot be held as INT8_ROW; they can as Q8_0, Q4_1"),
    ],
)
def test_what_cannot_be_held_is_refused_at_once(image, kept, message):
    with pytest.raises(Unsupported, match=message):
        change_weights(image, kept=kept)


def test_a_model_without_weights_is_refused():
    with pytest.raises(Unsupported, match="sim has no weights"):
        change_weights(SimpleNamespace(name="sim"))


def test_closing_it_closes_the_model_below(image):
    changed = change_weights(image)
    changed.close()
    assert image.closed == [True]
    with pytest.raises(Closed):
        _ = changed.weights
