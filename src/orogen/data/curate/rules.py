"""Stages that judge one document at a time. A rule returns why it is removed, or None, and may change its text.

The rules of Gopher and C4 are datatrove's, with words found by a regular expression: its own tokenizer for English is
spaCy's, 250 MB of packages.
"""

import functools
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.extractors.base import ExtractorSandbox
from datatrove.utils.word_tokenizers import WordTokenizer

from orogen.config.curate import C4Config, ClassifyConfig, ExtractConfig, GopherConfig, LanguageConfig
from orogen.data.curate.inputs import HTML
from orogen.data.curate.tally import Tally


class Rule(Protocol):
    """One stage. It is sent to worker processes, so that what is slow to load is loaded on the first call."""

    name: str

    def __call__(self, document: Document, tally: Tally) -> str | None:
        """Why the document is removed, None if it is not. May change its text and metadata, and count groups."""
        ...

    def close(self) -> None:
        """Ends what the rule started."""
        ...


class Words(WordTokenizer):
    """Words with their inner hyphens and apostrophes, and runs of other characters; sentences by their marks."""

    WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]+")
    SENTENCE = re.compile(r"[^.!?…]*[.!?…]*\s*")

    def word_tokenize(self, text: str) -> list[str]:
        """The words in order."""
        return self.WORD.findall(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """The sentences in order, each with the space behind it."""
        return [match.span() for match in self.SENTENCE.finditer(text) if match.group().strip()]

    def sent_tokenize(self, text: str) -> list[str]:
        """The sentences' texts."""
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]


class Extract:
    """Text from HTML, in a process of its own that can be ended: a page may take forever or exhaust the memory."""

    name = "extract"

    def __init__(self, config: ExtractConfig):
        self._config = config
        self._sandbox: ExtractorSandbox | None = None

    def __call__(self, document: Document, tally: Tally) -> str | None:
        del tally
        if not document.metadata.pop(HTML, False):
            return None
        if self._sandbox is None:
            self._sandbox = ExtractorSandbox(timeout=self._config.seconds, warmup_text="<p>text</p>")
        take = {"resiliparse": _resiliparse, "trafilatura": _trafilatura}[self._config.extractor]
        try:
            document.text = self._sandbox.process_document(document.text, take) or ""
        except TimeoutError:
            return f"took more than {self._config.seconds:g} seconds"
        except EOFError:
            return "the extractor's process ended"
        if document.text.startswith(_FAILED):
            return f"the extractor failed: {document.text.removeprefix(_FAILED)}"
        return None if document.text.strip() else "no text"

    def close(self) -> None:
        """Ends the extractor's process."""
        if self._sandbox is not None:
            self._sandbox.__exit__(None, None, None)
            self._sandbox = None


_FAILED = "\0failed: "  # in front of an error's name; documents with NUL characters are not curated


def _resiliparse(page: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    try:
        return extract_plain_text(page, main_content=True)
    except Exception as error:  # any that a parser of hostile input raises; the stage reports it for this page
        return _FAILED + type(error).__name__


def _trafilatura(page: str) -> str | None:
    extractor = _trafilatura_extractor()  # an import that fails is not the page's fault
    try:
        return extractor.extract(page)
    except Exception as error:  # as above
        return _FAILED + type(error).__name__


@functools.cache
def _trafilatura_extractor() -> Any:
    from datatrove.pipeline.extractors.trafilatura import Trafilatura

    return Trafilatura(deduplicate=False)  # which drops repeated paragraphs by what earlier pages held


class Language:
    """Names the language, and removes documents in others or in none for certain."""

    name = "language"

    def __init__(self, config: LanguageConfig):
        self._config = config

    def __call__(self, document: Document, tally: Tally) -> str | None:
        language, probability = _identifier().classify(document.text)
        tally.group("language", language, len(document.text.encode()))
        document.metadata["language"] = language
        document.metadata["language_probability"] = round(float(probability), 4)
        if self._config.languages and language not in self._config.languages:
            return f"language {language}"
        return "language uncertain" if probability < self._config.min_probability else None

    def close(self) -> None:
        """Nothing to end."""


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class Gopher:
    """Gopher's rules of quality and, on request, repetition."""

    name = "gopher"

    def __init__(self, config: GopherConfig):
        from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
        from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter

        quality = GopherQualityFilter(
            min_doc_words=config.min_words, max_doc_words=config.max_words,
            min_avg_word_length=config.min_mean_length, max_avg_word_length=config.max_mean_length,
            max_symbol_word_ratio=config.max_symbols, max_bullet_lines_ratio=config.max_bullets,
            max_ellipsis_lines_ratio=config.max_ellipses, max_non_alpha_words_ratio=config.min_alphabetic,
            min_stop_words=config.min_stop_words, stop_words=list(config.stop_words),
            language=Words(),  # pyright: ignore[reportArgumentType]  datatrove takes a tokenizer too
        )  # fmt: skip
        repetition = GopherRepetitionFilter(language=Words())  # pyright: ignore[reportArgumentType]
        self._filters = [quality, *([repetition] if config.repetition else [])]

    def __call__(self, document: Document, tally: Tally) -> str | None:
        del tally
        return next(filter(None, (_reason(one, document) for one in self._filters)), None)

    def close(self) -> None:
        """Nothing to end."""


class C4:
    """C4's rules of lines and sentences."""

    name = "c4"

    def __init__(self, config: C4Config):
        from datatrove.pipeline.filters.c4_filters import C4QualityFilter

        self._filter = C4QualityFilter(
            filter_no_terminal_punct=config.terminal_punctuation, min_words_per_line=config.min_words_per_line,
            min_num_sentences=config.min_sentences, filter_curly_bracket=config.curly_brackets,
            language=Words(),  # pyright: ignore[reportArgumentType]
        )  # fmt: skip

    def __call__(self, document: Document, tally: Tally) -> str | None:
        del tally
        return _reason(self._filter, document) or (None if document.text else "no line left")

    def close(self) -> None:
        """Nothing to end."""


def _reason(one: Any, document: Document) -> str | None:
    """Why a filter of datatrove removes the document: it answers True, or (False, reason)."""
    answer = one.filter(document)
    return None if answer is True else answer[1].removeprefix("gopher_").replace("_", " ")


class Classify:
    """Removes documents that the trained classifier takes for bad ones."""

    name = "classify"

    def __init__(self, config: ClassifyConfig, weights: Path):
        self._config, self._file = config, weights
        self._weights: Any = None

    def __call__(self, document: Document, tally: Tally) -> str | None:
        from orogen.data.curate.classifier import probability

        if self._weights is None:
            with np.load(self._file) as arrays:
                self._weights = arrays["weights"]
        good = probability(document.text, self._weights, self._config)
        tally.group("quality", f"{min(int(good * 10), 9) / 10:.1f}", len(document.text.encode()))
        document.metadata["quality"] = round(good, 4)
        return f"quality below {self._config.threshold:g}" if good < self._config.threshold else None

    def close(self) -> None:
        """Nothing to end."""
