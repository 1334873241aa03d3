"""The plugin `grammar`: compiles what `Sampling.grammar` asks for, for any model whose image tells its tokens' bytes.

known? ──no──> tried in a process of its own ──well──> compiled here, for this vocabulary ──> kept for the next
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import llm_os
from llm_os import Grammar, Image, RequestError, hookimpl

if TYPE_CHECKING:
    from llm_os.plugins.grammar.engine import Language, Vocabulary
    from llm_os.plugins.grammar.trial import Trial

MAX_LANGUAGES = 64
MAX_KEPT = 2 << 20  # characters of their sources together; compiled, one takes some 50 bytes
MAX_VOCABULARIES = 4


class GrammarPlugin:
    """One kernel's. Its hooks are called in one thread, one at a time."""

    def __init__(self) -> None:
        self.languages: OrderedDict[tuple[int, str, str], Language] = OrderedDict()  # the last used is last
        self._vocabularies: list[Vocabulary] = []
        self._trial: Trial | None = None

    @hookimpl
    def compile_grammar(self, grammar: Grammar, image: Image) -> llm_os.Language:
        try:
            from llm_os.plugins.grammar import engine
        except ImportError as error:
            raise RequestError(f"grammars need llguidance; pip install llguidance ({error})") from None
        vocabulary = self._vocabulary(image)
        key = (id(vocabulary), grammar.kind, grammar.source)
        if key not in self.languages:
            engine.check_syntax(grammar.kind, grammar.source)
            self._try(grammar)
            self.languages[key] = engine.Language(vocabulary, engine.to_grammar(grammar.kind, grammar.source))
            self._forget()
        self.languages.move_to_end(key)
        return self.languages[key]

    @hookimpl
    def halting(self) -> None:
        if self._trial is not None:
            self._trial.close()

    def _try(self, grammar: Grammar) -> None:
        """Raises RequestError if it is wrong, or too much."""
        from llm_os.plugins.grammar import engine
        from llm_os.plugins.grammar.trial import Trial

        trial = self._trial = self._trial or Trial()
        try:
            wrong, where = trial.ask(grammar.kind, grammar.source, engine.LIMITS, engine.OPTIONS)
        except RequestError as error:
            raise RequestError(f"the {engine.NAMES[grammar.kind]} cannot be used: {error}") from None
        if wrong:
            raise engine.explain(grammar.kind, wrong, where)

    def _vocabulary(self, image: Image) -> Vocabulary:
        from llm_os.plugins.grammar.engine import Vocabulary

        try:
            tokens = image.token_bytes()
        except AttributeError:
            raise RequestError(f"{image.name} does not tell the bytes of its tokens, which a grammar needs") from None
        ends = tuple(sorted(image.turn_end_tokens | image.text_end_tokens))
        for vocabulary in self._vocabularies:
            if vocabulary.ends == ends and (vocabulary.tokens is tokens or vocabulary.tokens == tokens):
                return vocabulary
        if len(self._vocabularies) == MAX_VOCABULARIES:
            oldest = id(self._vocabularies.pop(0))
            for key in [key for key in self.languages if key[0] == oldest]:
                del self.languages[key]
        self._vocabularies.append(Vocabulary(tokens, ends))
        return self._vocabularies[-1]

    def _forget(self) -> None:
        """Those that were not used for the longest time, until the rest may be kept."""
        while len(self.languages) > 1 and (
            len(self.languages) > MAX_LANGUAGES or sum(len(source) for _, _, source in self.languages) > MAX_KEPT
        ):
            self.languages.popitem(last=False)
