"""What personal data looks like: one pattern for each form, and what has to hold beyond the pattern.

Every pattern is linear: what repeats is bounded or possessive, and begins only where no such thing goes on already.
They see folded text (`folding`). Names and dates are found only where the words around them say what they are
(`contexts`); a number that any other number could be is found only where it checks or where a word says so.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import NamedTuple

from llm_os.plugins.redact import checksums, contexts

KINDS = (
    "EMAIL", "PHONE", "CARD", "IBAN", "IP", "URL", "SSN", "NATIONAL_ID", "BIRTHDATE", "SECRET", "CRYPTO", "NAME",
)  # fmt: skip

Check = Callable[[re.Match[str]], tuple[int, int] | None]


class Recognizer(NamedTuple):
    """`check` says where in a match the data lies, or None if it is none."""

    kind: str
    pattern: re.Pattern[str]
    check: Check


def _value(match: re.Match[str]) -> tuple[int, int]:
    return match.span("v") if "v" in match.re.groupindex else match.span()


def _if(holds: Callable[[str], bool]) -> Check:
    """Where a checksum holds for what is left without separators."""

    def check(match: re.Match[str]) -> tuple[int, int] | None:
        start, end = _value(match)
        return (start, end) if holds(re.sub(r"[^0-9A-Za-z]", "", match.string[start:end])) else None

    return check


def _address(match: re.Match[str]) -> tuple[int, int] | None:
    return None if match[0].startswith("git@") else match.span()


def _url(match: re.Match[str]) -> tuple[int, int]:
    end = match.end()
    while match.string[end - 1] in ".,;:!?)]}'\"":
        end -= 1
    return match.start(), end


_NO_ADDRESS = re.compile(r"(?:version|release|build|firmware|section|chapter|clause|oid|[ §]|\bv)[ .:]{0,2}$", re.I)


def _ipv4(match: re.Match[str]) -> tuple[int, int] | None:
    parts = match[0].split(".")
    if any(int(part) > 255 or (part[0] == "0" and part != "0") for part in parts):
        return None
    before = match.string[max(0, match.start() - 12) : match.start()].rstrip(" ")
    if _NO_ADDRESS.search(before) or parts[0] in ("0", "127", "255"):
        return None
    return match.span()


def _ipv6(match: re.Match[str]) -> tuple[int, int] | None:
    try:
        address = ipaddress.IPv6Address(match[0])
    except ValueError:
        return None
    groups = [group for group in match[0].split(":") if group]
    if address.is_loopback or address.is_unspecified or (len(groups) < 3 and len(groups[0]) < 3):
        return None
    return match.span()


_COUNTRY = re.compile(
    r"1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|2[1-6]\d|29\d|3[578]\d|42\d|50\d|59\d|67\d|68\d|69\d"
    r"|80\d|85\d|87\d|88\d|96\d|97\d|99\d"
)


def _international(match: re.Match[str]) -> tuple[int, int] | None:
    digits = re.sub(r"\D", "", match[0])
    digits = digits[2:] if match[0].startswith("00") else digits
    return match.span() if 8 <= len(digits) <= 15 and _COUNTRY.match(digits) else None


def _spoken(match: re.Match[str]) -> tuple[int, int] | None:
    """A number after a word such as "phone"."""
    return match.span("v") if 7 <= sum(map(str.isdigit, match["v"])) <= 15 else None


_IBAN_REST = {
    country: re.compile(rf"[A-Z]{{2}}\d\d(?:[ -]?[A-Z0-9]){{{length - 4}}}(?![A-Z0-9])", re.I)
    for country, length in checksums.IBAN_LENGTHS.items()
}


def _iban(match: re.Match[str]) -> tuple[int, int] | None:
    whole = _IBAN_REST.get(match[0][:2].upper())
    account = whole.match(match.string, match.start()) if whole else None
    if account is None or not checksums.iban(re.sub("[ -]", "", account[0]).upper()):
        return None
    return account.span()


_CODE = re.compile(r"[A-Za-z_][\w.:>-]*[(\[]|https?:|[$%]?\{|\$\(|/")


def _password(match: re.Match[str]) -> tuple[int, int] | None:
    """Not "the password is required": it has a digit or a sign in it. Not "password = ask(user)" either."""
    value = match["v"].rstrip(".,!?:)]}")
    if len(value) < 6 or not re.search(r"[^A-Za-z'-]", value) or _CODE.match(value):
        return None
    return match.start("v"), match.start("v") + len(value)


def _mixed(match: re.Match[str]) -> tuple[int, int] | None:
    return match.span() if any(map(str.isdigit, match[0])) else None


_W = r"0-9A-Za-z_\u00c0-\u024f\u0370-\u052f"  # letters that addresses are written in; others may touch them
_HOST = rf"(?:[{_W}-]{{1,63}}+\.){{1,8}}(?:[A-Za-z\u00c0-\u024f\u0370-\u052f]{{2,24}}+|xn--[a-z0-9-]{{2,59}})"
_FORMS: tuple[tuple[str, str, Check], ...] = (
    ("SECRET", r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?:[^-]|-(?!----)){0,16384}+(?:-----END [A-Z ]{0,40}-----)?",
     _value),
    ("URL", rf"(?<![{_W}])[A-Za-z][A-Za-z0-9+.-]{{1,20}}+://[^\s/@:<>\"\\]{{0,128}}+:[^\s/@<>\"\\]{{1,256}}+@[^\s<>\"]{{1,512}}+",
     _url),
    ("EMAIL", rf"(?<![{_W}])[{_W}][{_W}.+%'-]{{0,127}}+@{_HOST}", _address),
    ("EMAIL", rf"(?i)(?<![{_W}])[{_W}][{_W}.+%-]{{0,63}}+ ?[(\[{{] ?(?:at|@) ?[)\]}}] ?[{_W}-]{{1,63}}+"
              rf"(?: ?(?:\.|[(\[{{] ?(?:dot|punkt|point|punto) ?[)\]}}]) ?[{_W}-]{{2,63}}+){{1,4}}", _value),
    ("IBAN", r"(?i)(?<![A-Z0-9])[A-Z]{2}\d\d(?=[ -]?[A-Z0-9]{2})", _iban),
    ("CARD", r"(?<![\d.])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}|3[47]\d\d[ -]?\d{6}[ -]?\d{5}|3\d{3}[ -]?\d{6}[ -]?\d{4}"
             r"|\d{13,19})(?!\d)", _if(checksums.card)),
    ("SSN", r"(?<![\w-])\d{3}([- ])\d\d\1\d{4}(?![\w-])", _if(checksums.social_security)),
    ("SSN", r"(?i)\b(?:ssn|social security)[^\d\n]{0,24}(?P<v>\d{3}[ -]?\d\d[ -]?\d{4})(?!\d)",
     _if(checksums.social_security)),
    ("NATIONAL_ID", r"(?<![\w])\d{2} ?\d{3} ?\d{3} ?\d{3}(?![\w])(?<=\d{3} \d{3} \d{3})", _if(checksums.german_tax)),
    ("NATIONAL_ID", r"(?i)\b(?:steuer|tax|id-?nr|tin\b)[^\d\n]{0,32}(?P<v>\d{2}[ /]?\d{3}[ /]?\d{3}[ /]?\d{3})(?!\d)",
     _if(checksums.german_tax)),
    ("NATIONAL_ID", r"(?<!\w)\d\d ?[0-3]\d[01]\d\d\d ?[A-Z] ?\d{3}(?!\w)", _if(checksums.german_pension)),
    ("NATIONAL_ID", r"(?i)ausweis[^\d\n]{0,24}?\b(?P<v>[CFGHJKLMNPRTVWXYZ0-9]{9}\d)(?!\w)",
     _if(lambda number: checksums.german_card(number.upper()))),
    ("NATIONAL_ID", r"(?<!\w)[1-478] ?\d\d ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d\d|2[ABab]) ?\d{3} ?\d{3} ?\d\d(?!\w)",
     _if(checksums.french_insurance)),
    ("NATIONAL_ID", r"(?<!\w)(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z]([ -]?)\d\d\1\d\d\1\d\d\1[A-D]"
                    r"(?!\w)", _value),
    ("NATIONAL_ID", r"\bNHS[^\d\n]{0,24}(?P<v>\d{3}[ -]?\d{3}[ -]?\d{4})(?!\d)", _if(checksums.british_health)),
    ("NATIONAL_ID", r"(?<![\w.])(?:\d{8}|\d\d\.\d{3}\.\d{3}|[XYZxyz]-?\d{7})-?[A-HJ-NP-TV-Za-hj-np-tv-z](?!\w)",
     _if(checksums.spanish_identity)),
    ("NATIONAL_ID", r"(?i)(?<!\w)[A-Z]{6}\d\d[A-EHLMPRST][0-7]\d[A-Z]\d{3}[A-Z](?!\w)", _if(checksums.italian_fiscal)),
    ("NATIONAL_ID", r"(?<![\w.])\d{3}\.\d{3}\.\d{3}-\d\d(?!\w)", _if(checksums.brazilian_person)),
    ("NATIONAL_ID", r"(?i)\b(?:passport|reisepass|passeport|pasaporte|passaporto)[a-z]{0,8} ?(?:no|nr|num|number|nummer"
                    r"|numéro|número|n°)?\.? ?(?:is|ist|est|es|è)? ?[:#]? ?(?P<v>[A-Z]{0,2}\d{6,9}|[CFGHJKLMNPRTVWXYZ]"
                    r"[CFGHJKLMNPRTVWXYZ0-9]{8})(?!\w)", lambda match: _passport(match)),
    ("IP", r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)", _ipv4),
    ("IP", r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}(?:(?:\d{1,3}\.){3}\d{1,3}|[0-9A-Fa-f]{1,4})?(?![\w:])", _ipv6),
    ("PHONE", r"(?<![\w+.])(?:\+|(?<!\d[ ,-])00)[1-9](?:[ ().\/-]{0,3}\d){7,14}(?!\d)", _international),
    ("PHONE", r"(?<![\w.+-])(?:1[-. ])?(?:\([2-9]\d\d\) ?[2-9]\d\d[-. ]\d{4}"
              r"|[2-9]\d\d([-.])[2-9]\d\d\1\d{4})(?![\w-]|\.\d)", _value),
    ("PHONE", r"(?<![\w.+/-])(?<!\d )(?:\(?0(?:7\d{3}\)? \d{3} ?\d{3}|20\)? \d{4} \d{4}|1\d\d\)? \d{3} \d{4}"
              r"|1\d{3}\)? \d{6})|0[1-79](?:[ .]\d\d){4}|0(?:1[5-7]\d|[2-9]\d{1,4})(?: ?[/-] ?| )\d{3,4}"
              r"(?:[ -]?\d{2,4}){1,2})(?![\w/-]|\.\d)", _value),
    ("SECRET", r"(?<![\w-])(?:sk-[A-Za-z0-9_-]{20,256}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,128}"
               r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,255}|glpat-[\w-]{20,64}"
               r"|xox[abeprs]-[A-Za-z0-9-]{10,250}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}|hf_[A-Za-z0-9]{30,64}"
               r"|npm_[A-Za-z0-9]{36}|pypi-[\w-]{40,300}|SG\.[\w-]{16,32}\.[\w-]{16,64}|ya29\.[\w-]{20,400}"
               r"|eyJ[\w-]{8,1000}+\.eyJ[\w-]{8,2000}+\.[\w-]{16,1000}+)(?![\w-])", _mixed),
    ("SECRET", r"(?i)\bbearer\s{1,3}(?P<v>[A-Za-z0-9._~+/=-]{16,2000}+)", _value),
    ("CRYPTO", r"(?<![A-Za-z0-9])[13][1-9A-HJ-NP-Za-km-z]{25,34}(?![A-Za-z0-9])",
     _if(checksums.bitcoin)),
    ("CRYPTO", r"(?i)(?<!\w)(?:bc|tb|ltc)1[02-9ac-hj-np-z]{11,87}(?!\w)", _if(checksums.bech32)),
    ("CRYPTO", r"(?<!\w)0x[0-9a-fA-F]{40}(?!\w)", _value),
)  # fmt: skip


def _passport(match: re.Match[str]) -> tuple[int, int] | None:
    return match.span("v") if sum(map(str.isdigit, match["v"])) >= 3 else None


_CONTEXTS: tuple[tuple[str, str, Check], ...] = (
    ("PHONE", contexts.PHONE, _spoken),
    ("BIRTHDATE", contexts.BIRTH, _value),
    ("SECRET", contexts.CREDENTIAL, _password),
    *(("NAME", pattern, contexts.name) for pattern in contexts.NAMES),
)


def built_in() -> list[Recognizer]:
    """The recognizers that need nothing installed."""
    return [Recognizer(kind, re.compile(pattern, re.ASCII), check) for kind, pattern, check in _FORMS] + [
        Recognizer(kind, re.compile(pattern), check) for kind, pattern, check in _CONTEXTS
    ]


def own(kind: str, pattern: re.Pattern[str]) -> Recognizer:
    """One of the operator's; a group named `v` is the data, else all of the match is."""
    return Recognizer(kind, pattern, _value)
