"""Presidio's pattern recognizers beside our own (`pip install "llm-os-runtime[presidio]"`).

On a blank spaCy pipeline: nothing that needs a language model (persons, places) is found. Its recognizers of e-mail
addresses and URLs are left out, as they fetch a list of domains from the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_os import ConfigError

_KINDS = {
    "PHONE_NUMBER": "PHONE",
    "CREDIT_CARD": "CARD",
    "IBAN_CODE": "IBAN",
    "IP_ADDRESS": "IP",
    "US_SSN": "SSN",
    "CRYPTO": "CRYPTO",
}
_IDENTITIES = "UK_NHS UK_NINO ES_NIF ES_NIE IT_FISCAL_CODE PL_PESEL FI_PERSONAL_IDENTITY_CODE IN_AADHAAR SG_NRIC_FIN"
_SCORE = 0.5  # as sure as presidio is of a checksum or of a word beside it


class Presidio:
    """Raises ConfigError where it is not installed."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        try:
            import spacy
            from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
            from presidio_analyzer.nlp_engine import SpacyNlpEngine
        except ImportError as error:
            raise ConfigError(
                f'options.redact.recognizer is "presidio", which cannot be imported ({error}); '
                'pip install "llm-os-runtime[presidio]"'
            ) from None
        entities = _KINDS | dict.fromkeys(_IDENTITIES.split(), "NATIONAL_ID")
        self._kinds = {entity: kind for entity, kind in entities.items() if kind in kinds}
        engine: Any = SpacyNlpEngine()
        engine.nlp = {"en": spacy.blank("en")}
        registry = RecognizerRegistry()
        registry.load_predefined_recognizers(languages=["en"], nlp_engine=engine)
        for recognizer in list(registry.recognizers):
            if not set(recognizer.supported_entities) & set(self._kinds):
                registry.remove_recognizer(recognizer.name)
        self._engine = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Start, end and kind."""
        for found in self._engine.analyze(text, "en", list(self._kinds), score_threshold=_SCORE):
            if (kind := self._kinds.get(found.entity_type)) is not None:
                yield found.start, found.end, kind
