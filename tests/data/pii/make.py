"""Writes the labelled sample: tune.jsonl, which the patterns were made with, and held_out.jsonl, which they were not.

Templates and values were written by hand, and the two files share neither; a seed chooses what goes together. Numbers
with check digits are published examples. Names are labelled wherever they stand, with words around them or without.
`python tests/data/pii/make.py` writes both files again, the same bytes.
"""

# ruff: noqa: E501

from __future__ import annotations

import json
import random
import re
from pathlib import Path

VALUES: dict[str, dict[str, list[str]]] = {
    "tune": {
        "EMAIL": [
            "alice@example.com", "bob.miller@mail.example.org", "j.doe+news@example.co.uk", "info@müller-söhne.de",
            "anna_k@firma.example.de", "x@y.io", "ops-team@sub.domain.example.net", "maria99@correo.example.es",
            "Pierre.Dupont@exemple.fr", "o'brien@example.ie", "lee@kaisha.example.jp", "support@example.com",
        ],
        "PHONE": [
            "+49 170 1234567", "+1 (212) 555-0123", "212-555-0187", "(415) 555-2671", "+44 20 7946 0958",
            "07700 900123", "06 12 34 56 78", "+33 6 12 34 56 78", "+34 612 34 56 78", "0170/1234567", "030 901820",
            "0049 30 901820", "+86 138 0013 8000", "+81 3-1234-5678", "+39 347 123 4567", "+1-800-555-0199",
        ],
        "CARD": [
            "4242424242424242", "4111 1111 1111 1111", "5555-5555-5555-4444", "378282246310005", "6011 1111 1111 1117",
            "3530111333300000", "30569309025904", "2223 0031 2200 3222",
        ],
        "IBAN": [
            "DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "FR14 2004 1010 0505 0001 3M02 606",
            "ES9121000418450200051332", "NL91 ABNA 0417 1643 00", "CH9300762011623852957", "AT611904300234573201",
        ],
        "IP": ["192.168.17.4", "203.0.113.77", "8.8.4.4", "2001:db8::8a2e:370:7334", "fe80::1ff:fe23:4567:890a"],
        "URL": ["https://bob:s3cret@git.example.com/repo", "postgres://app:pa55w0rd@db.example.com:5432/prod"],
        "SSN": ["536-22-8726", "219-09-9999", "457 55 5462"],
        "NATIONAL_ID": [
            "65 929 970 489", "2 55 08 14 168 025 38", "AB 12 34 56 C", "12345678Z", "X1234567L", "RSSMRA85T10A562S",
            "529.982.247-25", "65 170839 J 003",
        ],
        "BIRTHDATE": ["12.03.1985", "1985-03-12", "03/12/1985", "7/4/1990"],
        "SECRET": [
            "sk-proj-Ab12Cd34Ef56Gh78Ij90Kl12Mn34", "ghp_16C7e42F292c6912E7710c838347Ae178B4a", "AKIAIOSFODNN7EXAMPLE",
            "xoxb-123456789012-abcdefABCDEF1234", "AIzaSyA1234567890abcdefghijklmnopqrstuv",
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
        ],
        "CRYPTO": [
            "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4",
            "0x742d35Cc6634C0532925a3b844Bc454e4438f44e",
        ],
        "NAME": [
            "Alice Smith", "Bob Miller", "Jürgen Weiß", "François Lefèvre", "María García", "Giulia Rossi", "John O'Neill",
            "Anna-Lena Schmidt", "Ludwig van Beek", "Zoë Peters",
        ],
        "WORD": ["hunter2", "Tr0ub4dor&3", "correct-horse-9", "p@ssw0rd!x"],
    },
    "held_out": {
        "EMAIL": [
            "carol.jones@acme.example", "d_fischer@post.example.at", "hola@tienda-lopez.mx", "k.nakamura@univ.example.ac.jp",
            "first.middle.last@a.b.c.example.com", "émilie@exemple.ca", "dev+ci@build.example.dev", "T.Vos@gemeente.example.nl",
            "ivan-petrov@почта.рф", "sales1@shop24.example.biz", "paul%home@relay.example.org", "nina@example.museum",
        ],
        "PHONE": [
            "+49 (0)89 636-48018", "+1 646.555.0134", "303-555-0162", "(702) 555 0148", "+44 7911 123456", "020 7946 0018",
            "01 70 18 99 00", "+33 (0)1 70 18 99 00", "+34 915 55 01 23", "0176-55512345", "089/6364801", "0041 44 668 18 00",
            "+91 98765 43210", "+82 10-1234-5678", "+55 11 91234-5678", "+7 (495) 123-45-67", "+31 6 12345678",
        ],
        "CARD": [
            "4012888888881881", "5105 1051 0510 5100", "4000-0566-5566-5556", "371449635398431", "6011000990139424",
            "3566 0020 2036 0505", "38520000023237", "3714 496353 98431",
        ],
        "IBAN": [
            "IT60X0542811101000000123456", "BE68 5390 0754 7034", "PT50 0002 0123 1234 5678 9015 4",
            "PL61109010140000071219812874", "SE45 5000 0000 0583 9825 7466", "NO93 8601 1117 947", "IE29AIBK93115212345678",
        ],
        "IP": ["10.20.30.41", "198.51.100.23", "172.16.254.3", "2001:0db8:85a3:0000:0000:8a2e:0370:7334", "2606:4700:4700::1111"],
        "URL": ["ftp://anna:geheim99@files.example.de/in", "https://svc-user:9f8e7d@registry.example.io/v2/"],
        "SSN": ["078-05-1120", "443-21-9087", "612 34 5678"],
        "NATIONAL_ID": [
            "47 036 892 816", "1 84 12 76 451 089 46", "JG103759A", "00000000T", "MRTMTT91D08F205J", "111.444.777-35",
            "15 070649 C 103",
        ],
        "BIRTHDATE": ["24.12.1971", "1999-11-05", "05/11/1999", "1.9.62"],
        "SECRET": [
            "sk_live_4eC39HqLyjWDarjtT1zdp7dc", "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz12", "hf_AbCdEfGhIjKlMnOpQrStUvWxYz12345678",
            "glpat-Zy9Xw8Vu7Ts6Rq5Po4Nm", "ASIAQWERTYUIOP12ASDF", "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",
        ],
        "CRYPTO": [
            "3J98t1WpEZ73CNmQviecrnyiWrnqRhWNLy", "1BoatSLRHtKNngkdXEeobR76b53LETtpyT",
            "bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq", "0xde0B295669a9FD93d5F28D9Ec85E40f4cb697BAe",
        ],
        "NAME": [
            "Carol Jones", "David Fischer", "Léa Moreau", "Carlos Hernández", "Sven Åkesson", "Katarzyna Nowak", "Priya Raman",
            "Siobhán McCarthy", "Jan de Vries", "Oluwaseun Adeyemi",
        ],
        "WORD": ["Winter2024!", "qwertz_77", "L3tM31n", "x9$kkPq2"],
    },
}  # fmt: skip

TEMPLATES = {
    "tune": """
My name is {NAME} and you can mail me at {EMAIL}.
Please call {PHONE} after 5 pm, or write to {EMAIL}.
The card {CARD} was declined twice.
Pay to IBAN {IBAN}, reference 2024-17.
Login from {IP} failed at 2024-05-01 10:22:31.
git clone {URL}
My SSN is {SSN}.
I was born on {BIRTHDATE} in Boston.
Date of birth: {BIRTHDATE}, patient name: {NAME}
export OPENAI_API_KEY={SECRET}
The password is {SECRET:WORD} for the staging server.
Send the coins to {CRYPTO}, please.
Dear Mr. {NAME}, thank you for your order 10023991.
Kind regards,\\n{NAME}
Mein Name ist {NAME}, meine Nummer ist {PHONE}.
Sehr geehrte Frau {NAME}, Ihre IBAN {IBAN} wurde gespeichert.
Geboren am {BIRTHDATE} in Köln, Steuer-ID {NATIONAL_ID}.
Bitte an {EMAIL} schicken, nicht an {EMAIL}.
Das Passwort lautet: {SECRET:WORD}
Je m'appelle {NAME}, mon numéro est le {PHONE}.
Né le {BIRTHDATE}. Numéro : {NATIONAL_ID}
Mon adresse est {EMAIL} et ma carte {CARD}.
Me llamo {NAME} y mi correo es {EMAIL}.
Mi DNI es {NATIONAL_ID} y mi móvil {PHONE}.
Nacida el {BIRTHDATE}, cuenta {IBAN}.
Mi chiamo {NAME}; codice {NATIONAL_ID}; telefono {PHONE}.
Meu nome é {NAME}, CPF {NATIONAL_ID}, e-mail {EMAIL}.
Mijn naam is {NAME} en mijn rekening is {IBAN}.
我的邮箱是{EMAIL}，电话{PHONE}。
メールは{EMAIL}です。電話は{PHONE}です。
Мой адрес {EMAIL}, телефон {PHONE}.
{"user": "{EMAIL}", "ip": "{IP}", "card": "{CARD}"}
curl -H "Authorization: Bearer {SECRET}" https://api.example.com
{NAME} came to the office yesterday.
Contact:{EMAIL};tel:{PHONE};
<a href="mailto:{EMAIL}">write</a>
| {EMAIL} | {IBAN} | {CARD} |
ID on file: {NATIONAL_ID}. Nothing else.
token: {SECRET}
Client {IP} -> {IP} 443/tcp
Social Security {SSN}, card {CARD}
ssn={SSN} ip={IP}
DATABASE_URL={URL}
She sent it from {CRYPTO} to {CRYPTO}.
""",
    "held_out": """
Hi, this is {NAME} speaking, my number is {PHONE}, thanks.
Could you forward it to {EMAIL} (cc {EMAIL})?
I think {NAME} left; reach her under {PHONE}.
Charge it to my Visa {CARD} exp 04/27.
Our bank details: {IBAN} (Sparkasse).
Blocked {IP} for 30 minutes by fail2ban.
The remote is {URL} as far as I remember.
Applicant's social security number: {SSN}
He was born {BIRTHDATE}, she two years later.
DOB {BIRTHDATE}; insurance {NATIONAL_ID}
Here is my key, don't share it: {SECRET}
username: root password: {SECRET:WORD}
donations welcome: {CRYPTO}
Dear Dr. {NAME},\\n\\nyour appointment is on Monday.
Sincerely yours,\\n{NAME}
Mr {NAME} and Ms {NAME} signed the lease.
Ich heiße {NAME} und wohne in Bonn, Tel. {PHONE}.
Hallo Herr {NAME}, bitte rufen Sie mich zurück: {PHONE}
Überweisung auf {IBAN} bis Freitag, Rückfragen an {EMAIL}.
Geburtsdatum {BIRTHDATE}, Versicherungsnummer {NATIONAL_ID}.
Zugang: admin / Passwort: {SECRET:WORD}
Bonjour, je suis {NAME}, joignable au {PHONE} ou {EMAIL}.
Madame {NAME}, née le {BIRTHDATE}, n° {NATIONAL_ID}
Le compte {IBAN} est au nom de {NAME}.
Hola, soy {NAME}. Mi tarjeta es la {CARD}.
Fecha de nacimiento: {BIRTHDATE}. Teléfono: {PHONE}
Estimada {NAME}, su cuenta {IBAN} está activa.
Buongiorno, il mio nome è {NAME} ({EMAIL}), nato il {BIRTHDATE}.
Olá, me chamo {NAME}. Ligue para {PHONE}.
Documento: {NATIONAL_ID}
Geachte heer, bel {PHONE} of mail {EMAIL}.
请联系{EMAIL}或拨打{PHONE}，谢谢。
連絡先：{PHONE}（{EMAIL}）
Позвоните {PHONE} или напишите на {EMAIL}.
이메일 {EMAIL}, 전화 {PHONE} 입니다.
INSERT INTO users VALUES (17, '{NAME}', '{EMAIL}', '{PHONE}');
2024-06-02T08:11:09Z INFO login user={EMAIL} src={IP} ok
api_key = "{SECRET}"
{PHONE}
name;mail;iban\\n{NAME};{EMAIL};{IBAN}
wallet={CRYPTO}&amount=0.5
From: {NAME} <{EMAIL}>
SSN {SSN} belongs to the tenant of flat 12.
W-2 form, {SSN}, filed 2024-04-15
pip install --index-url {URL} internal-package
refund of 12.50 to card {CARD} is pending
traceroute to {IP}, 30 hops max, 60 byte packets
send 0.01 BTC: {CRYPTO}
Meine Kreditkarte: {CARD}, gültig bis 09/28
the key was {SECRET}, rotate it
""",
}

NEGATIVES = {
    "tune": """
Version 1.2.3.4 is out, upgrade from 10.0.19041.
ISBN 978-3-16-148410-0 and ISBN 0-306-40615-2
Order 4929-1182-0034 shipped on 2024-03-05.
Timestamp 1700000000, build 20240305123045.
It starts at 12:30:45 and ends at 14:00.
UUID 123e4567-e89b-12d3-a456-426614174000
commit 9fceb02d0ae598e95dc970b74767f19372d61af8
std::vector<int> a; foo::bar();
@property\\ndef name(self): return self._name
npm install @types/node@18.0.0
The password is required and must be long.
Dear Customer, dear Team, hello World!
Invoice no. 2024-0017 over 1,234.56 EUR
See section 3.2.1.4 for details.
EAN 4006381333931, article 12345678
MAC 00:1A:2B:3C:4D:5E
pi is 3.14159265358979
The meeting is on 12.03.2024 in Berlin.
127.0.0.1 is localhost, 0.0.0.0 is any, 255.255.255.0 a mask.
Tracking number 1Z999AA10123456784
The range 1000-2000-3000 is reserved.
1234 5678 9012 3456 is not a card.
DE00 0000 0000 0000 0000 00 is not an account.
Die Bestellnummer ist 100 200 300 400.
Le train part à 06:12 du quai 34.
color: #ff8800; width: 1024px
x = 2**31 - 1 = 2147483647
He scored 30-15, 40-30, then 6-4 6-3.
ssh://git.example.com:22/repo https://example.com/a?b=c
temperature: -12.5 to +38.2 degrees
git@github.com:org/repo.git
Dr. No is a film, and so is Mr. Right.
""",
    "held_out": """
Python 3.11.7 with numpy 2.4.6 and kernel 6.1.0.18.
Release v4.18.2.1 fixes CVE-2023-44487.
ISBN-13: 978-1-4028-9462-6, ISBN-10: 1-4028-9462-7
Bestellung 4500123456, Position 0010
RFC 2119, ISO 8601, DIN 5008 and 10 CFR 50.46
Run at 2023-11-14T22:13:20.123Z took 00:01:17.
sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
Coordinates 52.5200, 13.4050 or 40.7128,-74.0060
Article 5 GDPR, § 242 BGB, 18 U.S.C. 1030
The train 123-456 left platform 7 at 07:55.
OID 1.3.6.1.4.1.311 belongs to a vendor.
Model number 8471-3390-1123-0077
Zip codes 10115, 90210 and 75008
Born in the USA is an album from 1984.
Reset your password: follow the link.
The token is invalid and has expired.
git log --since=2024-01-01 --author=me
a[1:2:3], b[::2], dead::beef::cafe in C++
Konto 12 34 56, BLZ 100 500 00
Ratio 16:9, scale 1:25000
Prices: 1.299,00 and 12.499,99
Win 10 20 30 or 40 points!
Dear All, Dear Sir or Madam, Dear Diary,
La référence est 0123-AB-45.
Serial 5011 2233 4455 6677
docker pull registry.example.com/app@sha256:0123abcd
ping 127.0.0.53 or ::1
page 212, line 555, column 1234567
El pedido 600 123 se entrega el 5 de mayo.
Ergebnis 3:2 (1:1), 45.000 Zuschauer
Miss the bus and you miss the show. Sir Walter is a ship.
Frau am Steuer, Herr der Lage
""",
}


class Deck:
    """Values in turn, shuffled each time that all have had theirs."""

    def __init__(self, values: dict[str, list[str]], seed: str) -> None:
        self._values = values
        self._choose = random.Random(seed)
        self._left: dict[str, list[str]] = {}

    def draw(self, kind: str) -> str:
        if not self._left.get(kind):
            self._left[kind] = self._choose.sample(self._values[kind], len(self._values[kind]))
        return self._left[kind].pop()


def fill(template: str, deck: Deck) -> dict[str, object]:
    text = ""
    spans: list[tuple[int, int, str]] = []
    end = 0
    for slot in re.finditer(r"\{([A-Z_]+)(?::([A-Z]+))?\}", template):
        text += template[end : slot.start()]
        value = deck.draw(slot[2] or slot[1])
        spans.append((len(text), len(text) + len(value), slot[1]))
        text += value
        end = slot.end()
    return {"text": text + template[end:], "spans": spans}


def main() -> None:
    for split, values in VALUES.items():
        deck = Deck(values, f"llm-os {split}")
        samples = []
        for template in TEMPLATES[split].strip().splitlines():
            samples += [fill(template.replace("\\n", "\n"), deck) for _ in range(6)]
        samples += [{"text": text.replace("\\n", "\n"), "spans": []} for text in NEGATIVES[split].strip().splitlines()]
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        Path(__file__).with_name(f"{split}.jsonl").write_text("".join(dict.fromkeys(lines)), "utf-8")


if __name__ == "__main__":
    main()
