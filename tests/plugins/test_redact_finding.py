"""What the plugin `redact` finds: on the labelled sample, in other scripts, with an operator's options, and in how much
time on text that means to cost some."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

import llm_os
from llm_os.plugins.redact import figures
from llm_os.plugins.redact.finder import Finder
from llm_os.plugins.redact.mapping import Mapping
from llm_os.plugins.redact.options import Options, read

SAMPLES = Path(__file__).parents[1] / "data" / "pii"


@pytest.fixture(scope="module")
def finder() -> Finder:
    return Finder(Options())


def redact(text: str, finder: Finder) -> str:
    return Mapping(finder).redact(text)


@pytest.mark.parametrize(
    ("split", "precision", "recall", "floors"),
    [
        ("tune", 0.99, 0.97, {"NAME": (0.95, 0.90)}),
        ("held_out", 0.98, 0.87, {"NAME": (0.98, 0.52), "IP": (0.85, 0.98), "SECRET": (0.90, 0.90)}),
    ],
)
def test_the_labelled_sample_is_found_as_well_as_the_docs_say(
    finder: Finder, split: str, precision: float, recall: float, floors: dict[str, tuple[float, float]]
) -> None:
    samples = figures.read(SAMPLES / f"{split}.jsonl")
    measured = figures.measure(samples, finder.find)
    print(f"\n{split}\n{figures.table(measured)}")
    assert sum(bool(sample.spans) for sample in samples) >= 200
    assert measured["all"].precision >= precision and measured["all"].recall >= recall
    for kind in set(measured) - {"all"}:
        least_precise, least_found = floors.get(kind, (0.98, 0.98))
        assert measured[kind].precision >= least_precise, kind
        assert measured[kind].recall >= least_found, kind


def test_figures_count_what_is_right_wrong_and_missed() -> None:
    sample = figures.Sample("abcdefghij", [(0, 2, "EMAIL"), (4, 8, "PHONE")])
    spans = Finder(Options()).find("x@y.io")
    found = [spans[0]._replace(start=0, end=2), spans[0]._replace(start=4, end=6), spans[0]._replace(start=9, end=10)]
    measured = figures.measure([sample], lambda _: found)
    assert measured["EMAIL"] == figures.Figures(right=1, wrong=2, missed=0, characters=2, covered=2)
    assert measured["PHONE"] == figures.Figures(right=0, wrong=0, missed=1, characters=4, covered=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail ａｌｉｃｅ＠ｅｘａｍｐｌｅ．ｃｏｍ now", "mail <EMAIL_1> now"),  # full width
        ("call +٤٩ ١٧٠ ١٢٣٤٥٦٧", "call <PHONE_1>"),  # Arabic-Indic digits
        ("card ४२४२ ४२४२ ४२४२ ४२४२", "card <CARD_1>"),  # Devanagari digits
        ("4242\u00a04242\u202f4242\u20034242", "<CARD_1>"),  # other spaces
        ("SSN 536\u201322\u20118726", "SSN <SSN_1>"),  # other dashes
        ("al\u200bice@exam\u00adple.com!", "<EMAIL_1>!"),  # what cannot be seen
        ("𝐚lice@example.com", "<EMAIL_1>"),  # mathematical letters
        ("аlice@example.com", "<EMAIL_1>"),  # a Cyrillic letter
        ("write to alice [at] example [dot] com", "write to <EMAIL_1>"),
    ],
)
def test_other_scripts_and_lookalikes_do_not_hide_anything(finder: Finder, text: str, expected: str) -> None:
    assert redact(text, finder) == expected


@pytest.mark.parametrize(
    ("sound", "broken", "kind"),
    [
        ("4111 1111 1111 1111", "4111 1111 1111 1112", "CARD"),
        ("DE89 3704 0044 0532 0130 00", "DE88 3704 0044 0532 0130 00", "IBAN"),
        ("536-22-8726", "900-22-8726", "SSN"),
        ("65 929 970 489", "65 929 970 488", "NATIONAL_ID"),
        ("65 170839 J 003", "65 170839 J 004", "NATIONAL_ID"),
        ("Ausweis T220001293", "Ausweis T220001294", "NATIONAL_ID"),
        ("2 55 08 14 168 025 38", "2 55 08 14 168 025 39", "NATIONAL_ID"),
        ("NHS 943 476 5919", "NHS 943 476 5918", "NATIONAL_ID"),
        ("AB 12 34 56 C", "GB 12 34 56 C", "NATIONAL_ID"),
        ("12345678Z", "12345678A", "NATIONAL_ID"),
        ("RSSMRA85T10A562S", "RSSMRA85T10A562T", "NATIONAL_ID"),
        ("529.982.247-25", "529.982.247-26", "NATIONAL_ID"),
        ("192.168.17.4", "192.168.17.400", "IP"),
        ("2001:db8::8a2e:370:7334", "2001:db8::8a2e::7334", "IP"),
        ("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNb", "CRYPTO"),
        ("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t5", "CRYPTO"),
    ],
)
def test_a_number_with_a_wrong_check_digit_is_not_taken(finder: Finder, sound: str, broken: str, kind: str) -> None:
    assert [span.kind for span in finder.find(f"It is {sound} here")] == [kind]
    assert finder.find(f"It is {broken} here") == []


def test_a_private_key_goes_as_a_whole(finder: Finder) -> None:
    key = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIEow+/IBAA==\n-----END RSA PRIVATE KEY-----"
    assert redact(f"here:\n{key}\nthanks", finder) == "here:\n<SECRET_1>\nthanks"


def test_spans_that_overlap_become_one_that_covers_both(finder: Finder) -> None:
    assert redact("see https://bob:pw1@example.com/x", finder) == "see <URL_1>"
    assert redact("password: alice@example.com#1", finder) == "password: <EMAIL_1>"


def test_options_allow_values_choose_kinds_and_add_patterns() -> None:
    options = read(
        {
            "allow": ["Support@Example.com"],
            "kinds": ["EMAIL"],
            "patterns": {"STAFF_ID": r"\bE\d{6}\b", "PROJECT": r"project (?P<v>\w+)"},
        }
    )
    text = "E123456 of project apollo: bob@example.com, SUPPORT@example.com, +49 170 1234567"
    expected = "<STAFF_ID_1> of project <PROJECT_1>: <EMAIL_1>, SUPPORT@example.com, +49 170 1234567"
    assert redact(text, Finder(options)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alow": []}, "alow"),
        ({"kinds": ["MAIL"]}, "'MAIL'; there are: EMAIL"),
        ({"max_characters": 0}, "max_characters is 0"),
        ({"allow": ["x"] * 10_001}, "10001 values; the limit is 10000"),
        ({"patterns": {"STAFF_ID": "("}}, "'STAFF_ID'.*no regular expression"),
        ({"patterns": {"staff": "x"}}, "'staff'.*A-Z"),
        ({"patterns": {"EMAIL": "x"}}, "'EMAIL'.*none of"),
        ({"patterns": {"LONG": "x" * 1001}}, "1001 characters; the limit is 1000"),
        ({"patterns": {f"P{chr(65 + i // 26)}{chr(65 + i % 26)}": "x" for i in range(65)}}, "65 patterns"),
    ],
)
def test_options_that_cannot_be_used_stop_the_boot_and_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(llm_os.ConfigError, match=message) as caught:
        llm_os.Kernel(llm_os.Config(driver="sim", plugins=("redact",), options={"redact": options}))
    assert "\n" not in str(caught.value)


ATOMS = (
    "a", "1 ", "12 ", "@a.b", "a.", "a.a@", "1.1.", "3.3.3.3.", "+1 ", "<EMAIL_", "<EMAIL_1>", "Aa ", "my name is Aa ",
    "-----BEGIN PRIVATE KEY-----", "DE89 ", "-eyJ-", "password: ", "x://a:", "\u200b", "1-", "::1 ", "born on 1 ",
    "sk-a", "bc1q", "tel 1", "A'", "我叫王明，", "a (at) b ", "regards A ", "４", "x@y.io ", "T-",
)  # fmt: skip


def spend(folder: Path, seconds: int) -> str:
    """In a process that is killed when it takes too long or too much."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    finder = Finder(Options())
    for atom in ATOMS:
        redact((atom * 40_000)[:40_000], finder)
    redact("-eyJ" * 250_000, finder)
    redact("x@y.io " * 50_000, finder)
    again = "".join(f"my name is Aa Aa Aa B{'b' * n}.\n" for n in range(28))  # many values that begin alike
    redact(again + "Aa " * 100_000, finder)
    try:
        redact(" ".join(f"a{n}@b.co" for n in range(40_000)), finder)
    except llm_os.RequestError as error:
        return str(error)
    return "too many values are taken"


def test_hostile_text_costs_no_more_than_its_length(in_a_process: Callable[..., str], tmp_path: Path) -> None:
    assert "more than 10000 pieces of personal data" in in_a_process(spend, tmp_path, 120)


def test_presidio_finds_beside_our_own_patterns_and_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("presidio_analyzer", reason='presidio is not here: pip install "llm-os-runtime[presidio]"')
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("it looks for a host"))
    finder = Finder(Options(recognizer="presidio"))
    text = "mail alice@example.com, Singapore NRIC S1234567D"
    assert redact(text, finder) == "mail <EMAIL_1>, Singapore NRIC <NATIONAL_ID_1>"
    for place in range(430, 530, 9):  # it looks through windows, whose borders hide nothing
        assert redact("." * place + " NRIC S1234567D", finder) == "." * place + " NRIC <NATIONAL_ID_1>"


def test_presidio_that_is_not_installed_is_a_line_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "presidio_analyzer", None)
    with pytest.raises(llm_os.ConfigError, match=r"pip install .llm-os-runtime\[presidio\]"):
        Finder(Options(recognizer="presidio"))
