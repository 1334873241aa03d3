from hypothesis import given
from hypothesis import strategies as st

from llm_os.kernel.stop_strings import StopStrings

pieces = st.lists(st.text("ab", max_size=4), max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)


@given(pieces, stops)
def test_text_ends_before_the_first_stop_string(pieces: list[str], stops: tuple[str, ...]) -> None:
    scanner = StopStrings(stops)
    out = ""
    for piece in pieces:
        out += scanner.push(piece)
        if scanner.hit:
            break
    out += scanner.flush()

    text, expected, hit = "", "", False
    for piece in pieces:
        text += piece
        if found := [at for stop in stops if (at := text.find(stop)) >= 0]:
            expected, hit = text[: min(found)], True
            break
    assert (out, scanner.hit) == ((expected, True) if hit else (text, False))


@given(pieces, stops)
def test_only_what_could_become_a_stop_string_is_held_back(pieces: list[str], stops: tuple[str, ...]) -> None:
    scanner, fed, out = StopStrings(stops), "", ""
    for piece in pieces:
        fed += piece
        out += scanner.push(piece)
        if scanner.hit:
            return
        held = fed[len(out) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
