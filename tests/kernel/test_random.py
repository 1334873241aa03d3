from hypothesis import given
from hypothesis import strategies as st

from llm_os.kernel.random import philox, uniform


def test_philox_gives_the_known_answers_of_random123() -> None:
    f = 0xFFFFFFFF
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((f, f, f, f), (f, f)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    )


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31))
def test_uniform_is_a_pure_function_into_the_unit_interval(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0
    assert uniform(seed, position) == uniform(seed, position)


def test_uniforms_of_one_seed_are_spread_evenly() -> None:
    counts = [0] * 10
    for position in range(10_000):
        counts[int(uniform(7, position) * 10)] += 1
    assert all(900 < count < 1100 for count in counts)
