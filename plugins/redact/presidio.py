"""Presidio's recognizers of what ours do not know (`pip install "llm-os-runtime[presidio]"`): telephone numbers of any
region, and identity numbers of more countries.

On a blank spaCy pipeline, so nothing that needs a language model (persons, places). Those of its recognizers that ours
do better, or that go to the network (of e-mail addresses and URLs), are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_os import ConfigError

_IDENTITIES = (
    "AuMedicare AuTfn CaSin FiPersonalIdentityCode InAadhaar InPan KrRrn PlPesel SePersonnummer SgFin ZaIdNumber"
)
_WINDOW = 512  # characters that it sees at once: its time grows with their square
_OVERLAP = 64
_SCORE = 0.5  # as sure as presidio is of a checksum or of a word beside it


class Presidio:
    """Raises ConfigError where it is not installed."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        try:
            import spacy
            from presidio_analyzer import AnalyzerEngine, RecognizerRegistry, predefined_recognizers
            from presidio_analyzer.nlp_engine import SpacyNlpEngine
        except ImportError as error:
            raise ConfigError(
                f'options.redact.recognizer is "presidio", which cannot be imported ({error}); '
                'pip install "llm-os-runtime[presidio]"'
            ) from None
        wanted = {"Phone": "PHONE"} | dict.fromkeys(_IDENTITIES.split(), "NATIONAL_ID")
        self._kinds: dict[str, str] = {}  # presidio's name of it -> ours
        recognizers: list[Any] = []
        for name, kind in wanted.items():
            if kind in kinds:
                recognizers.append(getattr(predefined_recognizers, f"{name}Recognizer")(supported_language="en"))
                self._kinds |= dict.fromkeys(recognizers[-1].supported_entities, kind)
        engine: Any = SpacyNlpEngine()
        engine.nlp = {"en": spacy.blank("en")}
        registry = RecognizerRegistry(recognizers=recognizers, supported_languages=["en"])
        self._engine = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Start, end and kind."""
        for start in range(0, len(text) if self._kinds else 0, _WINDOW - _OVERLAP):
            window = text[start : start + _WINDOW]
            for found in self._engine.analyze(window, "en", list(self._kinds), score_threshold=_SCORE):
                yield start + found.start, start + found.end, self._kinds[found.entity_type]
