import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_os.kernel.config import Config, parse_bytes
from llm_os.kernel.errors import ConfigError, Error, RequestError
from llm_os.kernel.request import Request, Sampling


def test_an_unknown_field_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigError, match="no field 'pagesize'; did you mean 'frame_size'"):
        Config(pagesize=16)
    with pytest.raises(RequestError, match="Sampling has no field 'max_token'; did you mean 'max_tokens'"):
        Sampling(max_token=3)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2**31), ("500 MB", 500 * 10**6), ("1.5g", 3 * 2**29), (4096, 4096), ("7", 7), ("3k", 3072)],
)
def test_sizes_are_read_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_bytes("memory", text) == size


@given(st.text())
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    try:
        assert parse_bytes("memory", text) >= 0
    except ConfigError as error:
        assert "memory" in str(error)


@pytest.mark.parametrize(
    "fields",
    [
        {"memory": "lots"},
        {"memory": "-1"},
        {"memory": 1},
        {"memory": "1000000TiB"},
        {"memory": "999999999999999999TiB"},
        {"frame_size": 12},
        {"batch_tokens": 0},
        {"batch_size": -1},
        {"queue_limit": 2**40},
        {"threads": 0},
        {"precision": "double"},
    ],
)
def test_a_config_value_out_of_range_names_its_field(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Config(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": 2**63 - 1},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"top_k": -1},
        {"seed": 2**64},
        {"logprobs": 21},
        {"repetition_penalty": 0},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {1: float("inf")}},
        {"stop": ("",)},
        {"stop": ("x",) * 17},
    ],
)
def test_a_sampling_value_out_of_range_names_its_field(fields: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(fields)).split("_")[0]):
        Sampling(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": ["a"], "prompt": "x"},
        {"model": "m", "prompt": ["a"]},
        {"model": "m", "prompt": [None]},
        {"model": "m", "prompt": b"x"},
        {"model": "m", "prompt": "x", "tenant": None},
        {"model": "m", "prompt": "x", "sampling": None},
        {"model": "m", "prompt": "x", "sampling": {"max_token": 3}},
        {"model": "m", "prompt": "x", "nice": 1.5},
        {"model": "m", "messages": "hello"},
        {"model": "m", "messages": ["hello"]},
        {"prompt": "x"},
    ],
)
def test_a_request_of_wrong_types_is_refused_where_it_is_made(fields: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        Request(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 1.5},
        {"stop": "END"},
        {"stop": (b"a",)},
        {"logit_bias": {1.5: 1.0}},
        {"logit_bias": [1]},
        {"logprobs": 1.5},
    ],
)
def test_sampling_of_wrong_types_is_refused_with_the_field(fields: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(fields))):
        Sampling(**fields)


def test_what_was_checked_cannot_be_changed_afterwards() -> None:
    bias, prompt = {1: 1.0}, [1, 2]
    sampling, request = Sampling(logit_bias=bias), Request(model="m", prompt=prompt)
    bias[2], prompt[0] = float("nan"), -1
    assert sampling.logit_bias == {1: 1.0} and request.prompt == [1, 2]


def test_a_request_has_either_messages_or_a_prompt() -> None:
    with pytest.raises(RequestError, match="either messages"):
        Request(model="m")
    with pytest.raises(RequestError, match="either messages"):
        Request(model="m", prompt="x", messages=[])


def test_requests_travel_as_json() -> None:
    request = Request(model="m", prompt="x", sampling=Sampling(stop=("a",), logit_bias={3: 1.0}))
    assert msgspec.json.decode(msgspec.json.encode(request), type=Request) == request


def test_every_error_is_in_the_drawn_tree() -> None:
    import llm_os.kernel.errors as errors

    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, Error):
            assert name in (errors.__doc__ or "") and value.__doc__
