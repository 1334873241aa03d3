"""Words that say what stands beside them: a telephone number, a date of birth, a password, a name. In English, German,
French, Spanish, Italian, Portuguese and Dutch, and a little in Russian, Chinese, Japanese and Korean.
"""

from __future__ import annotations

import re

_MONTHS = (
    "january|february|march|april|may|june|july|august|september|october|november|december"
    "|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec"
    "|januar|jänner|februar|märz|mai|juni|juli|oktober|dezember"
    "|janvier|février|mars|avril|juin|juillet|août|septembre|octobre|novembre|décembre"
    "|enero|febrero|marzo|abril|mayo|junio|julio|agosto|septiembre|setiembre|octubre|noviembre|diciembre"
    "|gennaio|febbraio|aprile|maggio|giugno|luglio|settembre|ottobre|dicembre"
    "|janeiro|fevereiro|março|maio|junho|julho|setembro|outubro|novembro|dezembro"
    "|januari|februari|maart|mei|augustus"
    "|января|февраля|марта|апреля|мая|июня|июля|августа|сентября|октября|ноября|декабря"
)
_DATE = (
    r"(?:\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2} ?[-/.] ?\d{1,2} ?[-/.] ?(?:\d{4}|\d\d)"
    rf"|\d{{1,2}}(?:st|nd|rd|th|er|\.|º)?[ -](?:(?:de|of) )?(?:{_MONTHS})\.?,?[ -](?:(?:de|del|of) )?\d{{4}}"
    rf"|(?:{_MONTHS})\.? \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}}"
    r"|\d{4} ?年 ?\d{1,2} ?月 ?\d{1,2} ?日)(?!\d)"
)
_LINK = (
    r"[\s:=(,-]{0,4}(?:(?:is|was|on|am|el|le|il|em|op|el d[ií]a|ist|war|est|es|fue|è|é|em|the|den|дня)[\s:]{1,2}){0,2}"
)

BIRTH = (
    r"(?i)(?:\b(?:born(?: on)?|date of birth|birth ?date|birthday|d\.?o\.?b\b\.?|geboren|geburtsdatum|geburtstag"
    r"|n[ée]e?|date de naissance|nacid[oa]|nac[ií]|fecha de nacimiento|nat[oa]|data di nascita|data de nascimento"
    r"|nascid[oa]|nasci|geboortedatum|родил(?:ся|ась)|дата рождения)\b|\bgeb\.|\*(?= ?\d)|出生日期|出生于"
    rf"|生年月日|生日){_LINK}(?P<v>{_DATE})"
)
PHONE = (
    r"(?i)(?:\b(?:phone|telephone|tel|mobile|cell|fax|whatsapp|call|text|ring|reach (?:me|us|him|her) (?:at|on)|dial"
    r"|telefon|handy|mobil|rufnummer|durchwahl|téléphone|téléphoner|portable|móvil|teléfono|telefono|cellulare"
    r"|celular|telefone|telemóvel|telefoon|mobiel|телефон|тел)\w{0,8}\b|电话|手机|電話|携帯|전화)"
    r"[^\d\n+]{0,16}?(?P<v>\(?\d(?:[ ().\/-]{0,3}\d){5,14})(?![\d-])(?!\.\d)"
)
CREDENTIAL = (
    r"(?i)(?<![A-Za-z])(?:password|passwd|pwd|passphrase|passcode|passwort|kennwort|mot de passe|contraseña|senha"
    r"|wachtwoord|пароль|密码|api[ _-]?key|secret(?:[ _-]?(?:key|token))?|(?:access|auth|refresh)[ _-]?token"
    r"|client[ _-]?secret|token)[\"'`]?(?:\s{0,3}[:=]|(?: \w{1,12}){0,2} (?:is|was|ist|lautet|est|es|è|é):?)\s{0,3}"
    r"(?P<v0>[\"'`]?)(?P<v>[^\s\"'`,;<>]{6,256})"
)

MONTHS = frozenset(_MONTHS.replace("sept?", "sep|sept").split("|"))

_UPPER = r"A-ZÀ-ÖØ-ÞĀ-ŽΑ-ΩЁЄІЇА-Я"
_LETTERS = rf"{_UPPER}a-zß-öø-ÿ\u0100-\u024f\u0370-\u052f"
_WORD = (
    rf"[{_UPPER}](?:\.|[{_LETTERS}]?['’][{_UPPER}][{_LETTERS}]{{1,48}}+|[{_LETTERS}]{{1,48}}+)"
    rf"(?:-[{_LETTERS}]{{1,48}}+)?"
)
_SMALL = r"(?:(?:de|del|della|di|da|do|dos|das|van|von|zu|der|den|ter|la|le|du|bin|ibn|al|el|y|e|af) ){0,3}"
_NAME = rf"(?P<v>{_WORD}(?: {_SMALL}{_WORD}){{0,3}})(?![{_LETTERS}])"
_TITLE = (
    r"(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Professor|Doctor|Doktor|Herrn?|Frau|Monsieur|Madame|Mme|Mlle|Señora?|Srta|Signora?"
    r"|Sig|Sig\.ra|Dott|Dott\.ssa|Senhora?|Mevrouw|Meneer|Dhr|Mevr|(?<=[ao] )Sra?|(?<=el )Sr|(?<=al )Sr"
    r"|[Гг]осподин|[Гг]оспожа)"
)
_GREETING = (
    r"(?:Dear|Liebe[rs]?|Sehr geehrter?|Cher|Chère|Querid[oa]|Estimad[oa]|Car[oa]|Gentile|Beste|Geachte|Prezad[oa]"
    r"|Уважаем(?:ый|ая))"
)
_CLOSING = (
    r"(?i:(?:best|kind|warm|with best) regards|regards|sincerely(?: yours)?|yours (?:truly|sincerely|faithfully)"
    r"|best wishes|many thanks|mit freundlichen grüßen|(?:viele|beste|herzliche|liebe) grüße|cordialement|bien à vous"
    r"|(?:un )?saludos?(?: cordial(?:es)?)?|atentamente|cordiali saluti|distinti saluti|atenciosamente"
    r"|met vriendelijke groet)"
)
NAMES = (
    r"\b(?i:my (?:full |first |last |real )?name is|my name's|my name:|name's|i am called|signed by|ich hei(?:ß|ss)e"
    r"|mein name ist|je m['’]appelle|mon nom est|me llamo|mi nombre es|mi chiamo|il mio nome è|(?:o )?meu nome é"
    r"|eu me chamo|me chamo|mijn naam is|ik heet|меня зовут|jag heter|nazywam się)"
    rf"[ :]{{1,2}}(?:{_TITLE}\.? )?{_NAME}",
    rf"\b{_TITLE}\.? (?:{_TITLE}\.? )?{_NAME}",
    rf"\b{_GREETING} (?:{_TITLE}\.? )?{_NAME}(?=\s{{0,2}}[,!:\n])",
    rf"(?:^|(?<=[\n.!,])) ?{_CLOSING}[,.!]?\s{{1,4}}{_NAME}(?=\s{{0,2}}(?:\n|$))",
    r"\b(?i:(?:full|first|last|given|family|maiden|middle|patient|customer|employee|cardholder) name|surname|vorname"
    r"|nachname|familienname|geburtsname|prénom|apellidos?|nombre completo|cognome|sobrenome|nome completo|achternaam"
    rf"|voornaam|patient|фамилия)\s?[:=]\s{{0,3}}{_NAME}",
    r"(?:我叫|我的名字是|我名叫)(?P<v>[\u4e00-\u9fff]{2,4})(?=[，。,.!！；;、\s]|$)",
    r"私の名前は(?P<v>[\u4e00-\u9fff\u3040-\u30ff]{2,10}?)(?:です|と)",
    r"제 이름은 (?P<v>[\uac00-\ud7a3]{2,5}?)(?:입니다|이에요|예요)",
)
_NOBODY = frozenset(
    """
    all anyone applicant client colleague colleagues committee community customer customers diary editor everyone
    friend friends hiring madam member members parent parents reader recruiter santa sir sirs students support team
    user users kunde kunden kundin damen herren kolleginnen kollegen freunde eltern leser mitarbeiter bewerber cliente
    clientes clients equipo équipe squadra president klant klanten relatie the this not that unknown null none n/a
    mr mrs ms dr
    """.split()  # noqa: SIM905
)


def name(match: re.Match[str]) -> tuple[int, int] | None:
    """Nobody is called "Customer"."""
    words = match["v"].casefold().replace(".", "").split()
    return None if not words or words[0] in _NOBODY else match.span("v")
