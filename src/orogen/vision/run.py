"""What `orogen caption` and `orogen database` do."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orogen.checkpoint.open import open_model
from orogen.config.checks import ConfigError
from orogen.config.json_file import Record, Whole, read_json
from orogen.config.streams import say
from orogen.data.interleaved import read_image, read_interleaved
from orogen.vision.captioning import SEEN
from orogen.vision.database import Database, Entry, Hit
from orogen.vision.describe import Captioner, Prompt
from orogen.vision.encoder import BATCH, Encoder, open_encoder
from orogen.vision.examples import Pair, prompt
from orogen.vision.features import encode_corpus
from orogen.vision.retrieval import retrieve
from orogen.vision.scores import caption_scores
from orogen.vision.similar import Examples, Shot
from orogen.vision.tower import Encoded
from orogen.vision.transforms import ImageError, decode

FORM = Record({"encoder": str, "fingerprint": str, "image_token": Whole(), "retrieved": Whole(), "shots": Whole()})
NO_PAIR = "it is not one image and one caption"
CAPTIONED = 64  # images whose features are in memory at a time


class Seen(NamedTuple):
    """What a captioner's run folder says of its images; see `captioning`."""

    encoder: str
    fingerprint: str
    image_token: int
    retrieved: int
    shots: int


class Settings(NamedTuple):
    """How images are captioned. retrieved: captions per image; guard: see `retrieve`; shots: similar pairs of the
    corpus `examples` before each image, whose features are kept in the folder `features`, if there is one."""

    checkpoint: Path
    encoder: str
    database: Path | None
    retrieved: int
    guard: float | None
    tokens: int
    shots: int
    examples: Path | None
    features: Path | None


class Captioned(NamedTuple):
    """An image with its caption. image: its file's bytes; known: a reference caption, None without one; shots: the
    captions of the examples before it."""

    name: str
    image: bytes
    caption: str
    hits: list[Hit]
    known: str | None
    shots: list[str]


class Outcome(NamedTuple):
    """Captioned images, images left out with the reason, and scores against known captions, if there are any."""

    items: list[Captioned]
    broken: dict[str, str]
    scores: dict[str, float]
    bare: int = 0  # images for which nothing was retrieved, though captions were asked for

    def facts(self) -> dict[str, Any]:
        """As one JSON object."""
        items = [
            {
                "image": one.name,
                "caption": one.caption,
                "retrieved": [hit._asdict() for hit in one.hits],
                **({"examples": one.shots} if one.shots else {}),
                **({} if one.known is None else {"reference": one.known}),
            }
            for one in self.items
        ]
        scores = {"scores": self.scores} if self.scores else {}
        return {"captions": items, "broken": self.broken, "without_retrieved": self.bare, **scores}

    def lines(self) -> list[str]:
        """For a person."""
        lines = []
        for one in self.items:
            lines.append(f"{one.name}: {one.caption}")
            lines += [f"    {hit.score:.3f}  {hit.caption}  ({hit.source})" for hit in one.hits]
        lines += [f"left out: {name}: {why}" for name, why in self.broken.items()]
        lines += [f"nothing was retrieved for {self.bare} of {len(self.items)} images"] if self.bare else []
        return [*lines, *(f"{name:>10}  {value:.4f}" for name, value in self.scores.items())]


def read_seen(folder: Path) -> Seen:
    """The captioner's facts. Raises ConfigError for a folder of another model."""
    if not (folder / SEEN).is_file():
        raise ConfigError(f"checkpoint {str(folder)!r} has no {SEEN}; expected the run folder of a captioner")
    facts = read_json(folder / SEEN, FORM)
    return Seen(**{name: facts[name] for name in Seen._fields})


def check_encoder(encoder: Encoder, seen: Seen) -> None:
    """Raises ConfigError unless it is the encoder that the model was trained with."""
    if encoder.fingerprint != seen.fingerprint:
        raise ConfigError(
            f"encoder {encoder.source!r} is {encoder.fingerprint[:12]}; expected {seen.fingerprint[:12]}, with which "
            "the model was trained"
        )


def caption_images(settings: Settings, seen: Seen, images: Sequence[Path], corpus: Path | None) -> Outcome:
    """Captions the images of files, or the pairs of a corpus, whose captions are then scored against.

    A document of a corpus that is no pair, or whose image cannot be decoded, is left out and counted; a file named by
    itself is refused. Raises ConfigError.
    """
    encoder = open_encoder(settings.encoder)
    check_encoder(encoder, seen)
    database = None if settings.database is None else Database(settings.database, encoder)
    examples = _examples(settings, encoder)
    model = Captioner(open_model(settings.checkpoint), seen.image_token, tokens=settings.tokens)
    most = model.opened.config.retrieved_captions
    if most is not None and settings.retrieved > most:
        raise ConfigError(f"retrieved is {settings.retrieved}; expected at most {most}, which the model encodes")
    broken: dict[str, str] = {}
    named = _named(images) if corpus is None else _pairs(corpus, broken)
    items: list[Captioned] = []
    for part in _parts(named, encoder, broken):
        items += _captioned(part, model, database, examples, settings)
    if broken and corpus is None:
        name, why = next(iter(broken.items()))
        raise ConfigError(f"image {name!r}: {why}; expected an image")
    known = [(one.caption, [one.known]) for one in items if one.known is not None]
    scores = caption_scores(*map(list, zip(*known, strict=True))) if known else {}
    return Outcome(items, broken, scores, sum(not one.hits for one in items) if settings.retrieved else 0)


class _Part(NamedTuple):
    names: list[str]
    images: list[bytes]
    known: list[str | None]
    encoded: Encoded


def _examples(settings: Settings, encoder: Encoder) -> Examples | None:
    """The pairs that may stand before an image, encoded; None if none shall."""
    if not settings.shots or settings.examples is None:
        return None
    with contextlib.ExitStack() as stack:
        folder = settings.features or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return Examples(encode_corpus(str(settings.examples), encoder, folder, log=say))


def _captioned(
    part: _Part, model: Captioner, database: Database | None, examples: Examples | None, settings: Settings
) -> list[Captioned]:
    embedding_be = part.encoded.embedding_be
    hits: list[list[Hit]] = [[] for _ in part.names]
    shots: list[list[Shot]] = [[] for _ in part.names]
    if database is not None and settings.retrieved:
        hits = retrieve(database, embedding_be, settings.retrieved, guard=settings.guard)
    if examples is not None:
        shots = examples.similar(embedding_be, settings.shots, guard=settings.guard)
    made = zip(hits, shots, part.encoded.features_bpd, strict=True)
    prompts = [_prompt(found, before, features_pv, model) for found, before, features_pv in made]
    captions, told = model.captions(prompts), [[shot.caption for shot in before] for before in shots]
    columns = part.names, part.images, captions, hits, part.known, told
    return [Captioned(*one) for one in zip(*columns, strict=True)]


def _prompt(hits: Sequence[Hit], shots: Sequence[Shot], features_pv: np.ndarray, model: Captioner) -> Prompt:
    """Image 0 is the one to be captioned; those of the shots follow."""
    pairs = [Pair(number, shot.caption) for number, shot in enumerate(shots, 1)]
    features = {0: features_pv, **{number: shot.features_pv for number, shot in enumerate(shots, 1)}}
    captions = [hit.caption for hit in hits]
    if model.opened.config.retrieved_captions is not None:
        return Prompt(prompt(0, (), pairs, model.tokenizer), features, {0: captions})
    return Prompt(prompt(0, captions, pairs, model.tokenizer), features)


def _named(images: Sequence[Path]) -> Iterator[tuple[str, bytes, None]]:
    """The files of images."""
    for file in images:
        yield str(file), read_image(file, f"image {str(file)!r}"), None


def _pairs(corpus: Path, broken: dict[str, str]) -> Iterator[tuple[str, bytes, str | None]]:
    """The pairs of a corpus; other documents are noted in `broken`."""
    for document in read_interleaved(corpus):
        if document.caption is not None and isinstance(document.parts[0], bytes):
            yield document.key, document.parts[0], document.caption
        else:
            broken[document.key] = NO_PAIR


def _parts(named: Any, encoder: Encoder, broken: dict[str, str]) -> Iterator[_Part]:
    """The images that can be decoded, encoded, CAPTIONED at a time; others are noted in `broken`."""
    taken: list[tuple[str, bytes, str | None, np.ndarray]] = []

    def part() -> _Part:
        names, images, known, pixels = map(list, zip(*taken, strict=True))
        taken.clear()
        return _Part(names, images, known, encoder.encode_pixels(pixels))

    for name, data, caption in named:
        try:
            taken.append((name, data, caption, encoder.transform(decode(data))))
        except ImageError as error:
            broken[name] = str(error)
        if len(taken) == CAPTIONED:
            yield part()
    if taken:
        yield part()


def read_entries(corpus: Path, encoder: Encoder) -> tuple[list[Entry], np.ndarray, dict[str, str]]:
    """The pairs of a corpus as entries with their embeddings (n, e), and what was left out with the reason, by key.
    Raises ConfigError if nothing is left."""
    entries: list[Entry] = []
    parts, waiting = [], []
    left_out: dict[str, str] = {}
    for document in read_interleaved(corpus):
        if document.caption is None:
            left_out[document.key] = NO_PAIR
            continue
        try:
            image = document.parts[0]
            assert isinstance(image, bytes)
            waiting.append(encoder.transform(decode(image)))
        except ImageError as error:
            left_out[document.key] = str(error)
            continue
        entries.append(Entry(document.caption, document.key))
        if len(waiting) == BATCH:
            parts.append(encoder.encode_pixels(waiting).embedding_be)
            waiting = []
    parts.append(encoder.encode_pixels(waiting).embedding_be)
    if not entries:
        raise ConfigError(f"corpus {str(corpus)!r} has no image with a caption that can be used; expected one")
    return entries, np.concatenate(parts), left_out
