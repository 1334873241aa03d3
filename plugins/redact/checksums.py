"""The check digits of cards, accounts, addresses and identity numbers. Each says whether a string of the right shape,
without separators, is one.

Sources: ISO/IEC 7812 (cards), ISO 13616 (IBAN), BIP-13 and BIP-173/350 (Bitcoin), and the issuers of the others.
"""

from __future__ import annotations

import hashlib

IBAN_LENGTHS = {
    country: int(length)
    for length, countries in (
        (15, "NO"), (16, "BE"), (18, "DK FO FI GL NL SD"), (19, "MK SI"), (20, "AT BA EE KZ XK LT LU"),
        (21, "CR HR LV LI CH"), (22, "BH BG GE DE IE ME RS GB VA"), (23, "GI IL IQ TL AE OM SO"),
        (24, "AD CZ MD PK RO SA SK ES SE TN VG"), (25, "LY PT ST"), (26, "IS TR"), (27, "BI DJ FR GR IT MC MR SM"),
        (28, "AL AZ BY CY DO SV GT HU LB NI PL"), (29, "BR EG PS QA UA"), (30, "JO KW MU"), (31, "MT SC"), (32, "LC"),
        (33, "RU"),
    )
    for country in countries.split()
}  # fmt: skip
_BASE58 = {c: i for i, c in enumerate("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz")}
_BECH32 = {c: i for i, c in enumerate("qpzry9x8gf2tvdw0s3jn54khce6mua7l")}
_FISCAL_ODD = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)


def luhn(digits: str) -> bool:
    total = sum(map(int, digits[-1::-2]))
    return (total + sum((0, 2, 4, 6, 8, 1, 3, 5, 7, 9)[int(d)] for d in digits[-2::-2])) % 10 == 0


def card(digits: str) -> bool:
    """A card number of an issuer that exists."""
    size, two, four = len(digits), int(digits[:2]), int(digits[:4])
    known = (
        (digits[0] == "4" and size in (13, 16, 19))
        or (size == 16 and (51 <= two <= 55 or 2221 <= four <= 2720 or 2200 <= four <= 2204 or 3528 <= four <= 3589))
        or (size == 15 and two in (34, 37))
        or (size == 14 and (two in (36, 38, 39) or 300 <= four // 10 <= 305))
        or (16 <= size <= 19 and (four == 6011 or two in (62, 65) or 644 <= four // 10 <= 649))
        or (12 <= size <= 19 and four in (5018, 5020, 5038, 5893, 6304, 6759, 6761, 6762, 6763))
    )
    return known and luhn(digits)


def iban(text: str) -> bool:
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def bitcoin(address: str) -> bool:
    """Base58Check of a version byte and a hash of 20 bytes."""
    value = 0
    for character in address:
        value = value * 58 + _BASE58[character]
    if value >= 1 << 200:
        return False
    raw = value.to_bytes(25, "big")
    return hashlib.sha256(hashlib.sha256(raw[:21]).digest()).digest()[:4] == raw[21:]


def bech32(address: str) -> bool:
    """Bech32 or bech32m, in one case."""
    prefix, _, data = address.lower().rpartition("1")
    if address not in (address.lower(), address.upper()) or not all(c in _BECH32 for c in data):
        return False
    values = [ord(c) >> 5 for c in prefix] + [0] + [ord(c) & 31 for c in prefix] + [_BECH32[c] for c in data]
    check = 1
    for value in values:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= generator if top >> bit & 1 else 0
    return check in (1, 0x2BC830A3)


def social_security(digits: str) -> bool:
    """US: the areas, groups and serials that are given out."""
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"


def german_tax(digits: str) -> bool:
    """Steuer-Identifikationsnummer: ISO 7064 MOD 11,10, and of the first ten digits one occurs two or three times."""
    counts = sorted(digits[:10].count(d) for d in set(digits[:10]))
    if digits[0] == "0" or counts[-1] not in (2, 3) or (len(counts) > 1 and counts[-2] != 1):
        return False
    product = 10
    for digit in digits[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(digits[10])


def german_pension(number: str) -> bool:
    """Versicherungsnummer: 8 digits, a letter, 3 digits, of which the last one checks."""
    digits = number[:8] + f"{ord(number[8]) - 64:02d}" + number[9:11]
    total = 0
    for digit, weight in zip(digits, (2, 1, 2, 5, 7, 1, 2, 1, 2, 1, 2, 1), strict=True):
        total += sum(divmod(int(digit) * weight, 10))
    return total % 10 == int(number[11]) and 1 <= int(number[4:6]) <= 12


def german_card(number: str) -> bool:
    """Personalausweis and passport: nine characters and a digit, weights 7, 3, 1."""
    total = sum(int(c, 36) * (7, 3, 1)[i % 3] for i, c in enumerate(number[:9]))
    return number[9].isdigit() and total % 10 == int(number[9])


def french_insurance(number: str) -> bool:
    """NIR: 13 characters and a key modulo 97; 2A and 2B are Corsica."""
    body = number[:13].upper().replace("2A", "19").replace("2B", "18")
    return body.isdigit() and 97 - int(body) % 97 == int(number[13:])


def british_health(digits: str) -> bool:
    """NHS number: modulo 11."""
    check = 11 - sum(int(d) * (10 - i) for i, d in enumerate(digits[:9])) % 11
    return check % 11 == int(digits[9]) and check != 10


def spanish_identity(number: str) -> bool:
    """DNI and NIE: a letter modulo 23."""
    digits = number[:-1].upper().replace("X", "0").replace("Y", "1").replace("Z", "2")
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(digits) % 23] == number[-1].upper()


def italian_fiscal(number: str) -> bool:
    """Codice fiscale: 15 characters and a letter."""
    total = 0
    for index, character in enumerate(number[:15].upper()):
        value = int(character) if character.isdigit() else ord(character) - 65
        total += value if index % 2 else _FISCAL_ODD[value]
    return chr(65 + total % 26) == number[15].upper()


def brazilian_person(digits: str) -> bool:
    """CPF: two digits modulo 11."""
    for size in (9, 10):
        check = sum(int(d) * (size + 1 - i) for i, d in enumerate(digits[:size])) * 10 % 11 % 10
        if check != int(digits[size]):
            return False
    return len(set(digits)) > 1
