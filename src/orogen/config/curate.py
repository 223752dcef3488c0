"""How documents are curated: the sources, and the stages that change or remove documents, each one config.

A gin file names the stages that run: `CurateConfig.stages = [@LanguageConfig(), @DedupConfig()]`.
"""

import dataclasses
from typing import Annotated, TypeAlias, TypeVar

from orogen.config.checks import (
    check_types,
    require,
    require_choice,
    require_not_negative,
    require_positive,
)

EXTRACTORS = ("resiliparse", "trafilatura")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Text from HTML: records of WARC files and `.html` files. Other documents pass unchanged.

    A page that takes longer than `seconds` is removed and counted; the limit is far above what pages take, so that a
    busy machine removes none.
    """

    extractor: Annotated[str, "resiliparse (main content as plain text) or trafilatura (favouring precision)"] = (
        "resiliparse"
    )
    seconds: Annotated[float, "the longest that one page may take"] = 60.0

    def __post_init__(self) -> None:
        check_types(self)
        require_choice(self, "extractor", EXTRACTORS)
        require_positive(self, "seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Identification of each document's language with py3langid (97 languages)."""

    languages: Annotated[tuple[str, ...], "ISO 639-1 codes to keep; empty keeps all and only names them"] = ("en",)
    min_probability: Annotated[float, "documents identified with less are removed"] = 0.65

    def __post_init__(self) -> None:
        check_types(self)
        require(0 <= self.min_probability <= 1, self, "min_probability", "a number from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GopherConfig:
    """Quality rules of Gopher (arXiv:2112.11446, appendix A.1); the rules of repetition keep that paper's table A1."""

    min_words: Annotated[int, "fewest words of a document"] = 50
    max_words: Annotated[int, "most words of a document"] = 100_000
    min_mean_length: Annotated[int, "shortest mean word, in characters"] = 3
    max_mean_length: Annotated[int, "longest mean word, in characters"] = 10
    max_symbols: Annotated[float, "most hashes, and most ellipses, per word"] = 0.1
    max_bullets: Annotated[float, "largest share of lines that start with a bullet"] = 0.9
    max_ellipses: Annotated[float, "largest share of lines that end in an ellipsis"] = 0.3
    min_alphabetic: Annotated[float, "smallest share of words with a letter"] = 0.8
    min_stop_words: Annotated[int, "fewest different stop words"] = 2
    stop_words: Annotated[tuple[str, ...], "the stop words of the language"] = (
        "the", "be", "to", "of", "and", "that", "have", "with",
    )  # fmt: skip
    repetition: Annotated[bool, "whether repetitious documents are removed too"] = True

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "min_words", "max_words", "min_mean_length", "max_mean_length")
        require(self.max_words >= self.min_words, self, "max_words", f"at least min_words = {self.min_words}")
        expected = f"at least min_mean_length = {self.min_mean_length}"
        require(self.max_mean_length >= self.min_mean_length, self, "max_mean_length", expected)
        for field in ("max_symbols", "max_bullets", "max_ellipses", "min_alphabetic"):
            require(0 < getattr(self, field) <= 1, self, field, "a number above 0 and at most 1")
        require_not_negative(self, "min_stop_words")
        expected = f"at most the {len(self.stop_words)} stop_words"
        require(self.min_stop_words <= len(set(self.stop_words)), self, "min_stop_words", expected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class C4Config:
    """Rules of C4 (arXiv:1910.10683, section 2.2): removes lines, and documents with too few sentences left."""

    terminal_punctuation: Annotated[bool, "whether lines must end in a terminal punctuation mark"] = True
    min_words_per_line: Annotated[int, "fewest words of a line"] = 3
    min_sentences: Annotated[int, "fewest sentences of a document, after lines were removed"] = 5
    curly_brackets: Annotated[bool, "whether documents with a curly bracket are removed, as code"] = True

    def __post_init__(self) -> None:
        check_types(self)
        require_not_negative(self, "min_words_per_line", "min_sentences")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """A quality classifier, trained on the spot: logistic regression on hashed n-grams of words."""

    good: Annotated[tuple[str, ...], "files or folders of text to keep"]
    bad: Annotated[tuple[str, ...], "files or folders of text to remove"]
    threshold: Annotated[float, "documents whose probability of being good is lower are removed"] = 0.5
    features: Annotated[int, "buckets that n-grams are hashed into"] = 2**18
    ngrams: Annotated[int, "longest n-gram, in words"] = 2
    penalty: Annotated[float, "weight of the squared norm in the mean loss"] = 1e-4
    max_documents: Annotated[int, "documents of each kind to train on; a hash of the name chooses them"] = 20_000

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("good", "bad"):
            require(bool(getattr(self, field)), self, field, "at least one path")
        require(0 < self.threshold < 1, self, "threshold", "a number between 0 and 1")
        require(2 <= self.features <= 2**28, self, "features", "a number from 2 to 2**28")
        require(1 <= self.ngrams <= 5, self, "ngrams", "a number from 1 to 5")
        require_positive(self, "penalty")
        require(self.max_documents >= 10, self, "max_documents", "at least 10: a tenth is held out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Exact duplicates, and fuzzy ones by MinHash (Broder 1997), as MT-NLG (arXiv:2201.11990, section 3.1).

    Two documents are candidates if all hashes of one band agree: with probability 1 - (1 - J^rows)^bands, where J is
    the Jaccard index of their sets of shingles. Candidates whose index, estimated from all bands x rows hashes, reaches
    `jaccard` are duplicates. Of each connected component, the document of the first source stays, and of these the
    first in order.
    """

    shingle: Annotated[int, "words per shingle"] = 5
    bands: Annotated[int, "groups of hashes"] = 20
    rows: Annotated[int, "hashes per band"] = 13
    jaccard: Annotated[float, "smallest estimated Jaccard index of duplicates; 0 takes every candidate"] = 0.8
    seed: Annotated[int, "chooses the hash functions"] = 0

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("shingle", "bands", "rows"):
            require(1 <= getattr(self, field) <= 1000, self, field, "a number from 1 to 1000")
        require(0 <= self.jaccard <= 1, self, "jaccard", "a number from 0 to 1")
        require(0 <= self.seed < 2**32, self, "seed", "an integer from 0 to 2**32 - 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """Removes evaluation text from documents: a match of an n-gram splits the document around it.

    Numbers of MT-NLG's tool (Megatron-LM, tools/openwebtext/filter_ngrams.py). Evaluation texts with fewer than
    `shortest` words are not looked for.
    """

    evaluation: Annotated[tuple[str, ...], "files or folders of evaluation sets; every string of a record counts"]
    words: Annotated[int, "words of an n-gram"] = 13
    shortest: Annotated[int, "a text shorter than an n-gram is one n-gram itself, if it has so many words"] = 8
    margin: Annotated[int, "characters removed on each side, then on to the end of a sentence"] = 200
    min_characters: Annotated[int, "shorter pieces are removed"] = 200
    max_splits: Annotated[int, "documents split more often are removed"] = 10

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.evaluation), self, "evaluation", "at least one path")
        require(1 <= self.words <= 1000, self, "words", "a number from 1 to 1000")
        require(1 <= self.shortest <= self.words, self, "shortest", f"a number from 1 to words = {self.words}")
        require_not_negative(self, "margin", "min_characters", "max_splits")


Stage: TypeAlias = (
    ExtractConfig | LanguageConfig | GopherConfig | C4Config | ClassifyConfig | DedupConfig | DecontaminateConfig
)
Kind = TypeVar("Kind")
STAGES: tuple[type, ...] = (
    ExtractConfig,
    LanguageConfig,
    GopherConfig,
    C4Config,
    ClassifyConfig,
    DedupConfig,
    DecontaminateConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """What is curated, and by which stages. Raises ConfigError if fields are out of range or contradict each other.

    sources: files are .txt and .html (each file is a document), .jsonl and .parquet (each line or row), .warc and .wet
    (each record); all but .parquet also with .gz or .zst behind.
    shard_bytes: each task reads whole files, as many as fit; what is computed does not depend on it, except for the
    division of the output into files.
    """

    sources: Annotated[
        tuple[tuple[str, str], ...],
        "(name, file or folder) of each source; of duplicates, the copy of the first source stays",
    ]
    stages: Annotated[tuple[Stage, ...], "@ExtractConfig(), @LanguageConfig() …: those that run, in this order"] = ()
    text_field: Annotated[str, "the key (jsonl) or column (Parquet) that holds the text"] = "text"
    shard_bytes: Annotated[int, "bytes of input files per task and per file of the output"] = 2**26
    examples: Annotated[int, "removed documents that the report shows for each reason"] = 3

    def __post_init__(self) -> None:
        check_types(self)
        names = [name for name, _ in self.sources]
        require(bool(names) and all(names), self, "sources", "at least one source, each with a name")
        require(len(set(names)) == len(names), self, "sources", "sources with different names")
        order = [STAGES.index(type(stage)) for stage in self.stages]
        expected = "at most one of each, in the order " + ", ".join(kind.__name__ for kind in STAGES)
        require(order == sorted(set(order)), self, "stages", expected)
        require(self.text_field != "", self, "text_field", "a non-empty string")
        require_positive(self, "shard_bytes")
        require_not_negative(self, "examples")

    def stage(self, kind: type[Kind]) -> Kind | None:
        """The config of the stage of this kind, None if it does not run."""
        return next((stage for stage in self.stages if isinstance(stage, kind)), None)


CURATION = (CurateConfig, *STAGES)
