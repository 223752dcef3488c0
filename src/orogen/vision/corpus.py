"""A corpus of images and text, whose batches carry the features of their images.

Letters: b batch, t time, p vectors of an image, v their width, k neighbours.
"""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orogen.config.data import DataConfig
from orogen.config.vision import PREPENDED, VisionConfig
from orogen.data import corpora
from orogen.data.batches import HeldoutPass, Loader
from orogen.data.images import Placed, with_images
from orogen.data.learned import LearnedSplit
from orogen.data.loader import ONLY, Corpus, Source
from orogen.data.packing import Batch, Stream
from orogen.data.tokenizer import Tokenizer
from orogen.vision.database import Database
from orogen.vision.encoder import Encoder
from orogen.vision.examples import FIRST, Pair, chunks, example, image_token, interleaved, padded
from orogen.vision.features import Encoded
from orogen.vision.retrieval import retrieve
from orogen.vision.similar import as_pair, similar_pairs

TRAIN = "train"


class Told(NamedTuple):
    """What became of the documents of a corpus. broken: with an image that cannot be decoded; too_long: that do not
    fit into a row, or have more images than one."""

    documents: int
    images: int
    broken: int
    too_long: int


@dataclasses.dataclass(frozen=True)
class Sight:
    """Puts images into batches: features_npv of all of them, the token that stands for one, and the most of a row.
    caption_nkc: the tokens of each image's retrieved captions, for models that encode them."""

    features_npv: np.ndarray
    token: int
    room: int
    caption_nkc: np.ndarray | None = None

    def see(self, batch: Batch) -> Batch:
        """The batch with its images as extras, and `token` in their places."""
        stands_bt = batch.tokens_bt >= FIRST
        rows = [
            [self._placed(int(t), tokens_t[t] - FIRST) for t in np.flatnonzero(stands_t)]
            for tokens_t, stands_t in zip(batch.tokens_bt, stands_bt, strict=True)
        ]
        batch = batch._replace(tokens_bt=np.where(stands_bt, self.token, batch.tokens_bt).astype(np.int32))
        vectors, width = self.features_npv.shape[1:]
        tokens = None if self.caption_nkc is None else math.prod(self.caption_nkc.shape[1:])
        return with_images(batch, rows, room=self.room, shape=(vectors, width), caption_tokens=tokens)

    def _placed(self, position: int, image: int) -> Placed:
        return Placed(position, self.features_npv[image], None if self.caption_nkc is None else self.caption_nkc[image])


class SeeingLoader:
    """A loader whose batches carry images; positions are the loader's."""

    def __init__(self, loader: Loader, sight: Sight):
        self._loader, self._sight = loader, sight

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._sight.see(next(self._loader))

    def take(self, state: Any) -> Batch:
        """The next batch."""
        return next(self)

    def state(self) -> dict[str, Any]:
        """The position after the last batch taken."""
        return self._loader.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken. Raises ConfigError."""
        self._loader.restore(state)


@dataclasses.dataclass(frozen=True)
class SeeingPass:
    """A held-out pass whose batches carry images."""

    inner: HeldoutPass
    sight: Sight

    @property
    def byte_count(self) -> int:
        """UTF-8 bytes of the text that the whole pass scores."""
        return self.inner.byte_count

    def thinned(self, rows: int) -> "SeeingPass":
        """See `HeldoutPass.thinned`."""
        return dataclasses.replace(self, inner=self.inner.thinned(rows))

    def __iter__(self) -> Iterator[Batch]:
        return map(self.sight.see, self.inner)


class ImageCorpus(Corpus):
    """A corpus of documents with images. told: what became of them; seen: the facts that a caption needs."""

    def __init__(self, told: Told, sight: Sight, seen: dict[str, Any], **fields: Any):
        super().__init__(**fields)
        self.told, self.sight, self.seen = told, sight, seen

    def describe(self) -> dict[str, Any]:
        """As a corpus of text, with what became of the documents."""
        return {**super().describe(), **self.told._asdict()}

    def train_loader(self, **settings: Any) -> Any:
        """See `Corpus.train_loader`."""
        return SeeingLoader(super().train_loader(**settings), self.sight)

    def heldout_batches(self, split: str, **settings: Any) -> Any:
        """See `Corpus.heldout_batches`."""
        return SeeingPass(super().heldout_batches(split, **settings), self.sight)


def open_images(
    data: DataConfig, vision: VisionConfig, encoded: Encoded, encoder: Encoder, tokenizer: Tokenizer, *, length: int,
    caption_tokens: int | None = None,
) -> ImageCorpus:  # fmt: skip
    """The documents as streams for rows of `length` tokens, split by their keys. caption_tokens: of a caption, for
    models that encode them. Raises ConfigError."""
    documents = {document.key: document for document in encoded.documents}
    split_of = {key: corpora.split_of(key, config=data) for key in documents}
    database = None if vision.database is None else Database(Path(vision.database), encoder)
    streams = _streams(encoded, split_of, vision=vision, database=database, tokenizer=tokenizer)
    fitted = {key: padded(one, vision, length=length, pad_id=tokenizer.pad_id) for key, one in streams.items()}
    kept = {name: [] for name in corpora.SPLITS}
    for key, stream in fitted.items():
        if stream is not None:
            kept[split_of[key]].append(stream)
    corpora.check_splits({name: len(part) for name, part in kept.items()}, len(documents), config=data)
    splits = {name: LearnedSplit(part, tokenizer) for name, part in kept.items()}
    content = None if database is None else database.facts.content
    facts = [encoded.content_hash, encoder.fingerprint, dataclasses.asdict(vision), content, length, caption_tokens]
    known = json.dumps(facts)
    source = Source(hashlib.sha256(known.encode()).hexdigest(), splits, None)
    token = image_token(tokenizer, vision.image_token)
    told = Told(len(documents), len(encoded.features_npv), len(encoded.broken), sum(s is None for s in fitted.values()))
    seen = {
        "encoder": encoder.source, "fingerprint": encoder.fingerprint, "image_token": token,
        "retrieved": vision.retrieved, "shots": vision.shots,
    }  # fmt: skip
    captions_nkc = _encoded_captions(
        encoded, split_of, vision=vision, database=database, tokenizer=tokenizer, tokens=caption_tokens
    )
    sight = Sight(encoded.features_npv, token, vision.images_per_row, captions_nkc)
    return ImageCorpus(told, sight, seen, config=data, sources={ONLY: source}, tokenizer=tokenizer)


def _streams(
    encoded: Encoded, split_of: dict[str, str], *, vision: VisionConfig, database: Database | None,
    tokenizer: Tokenizer,
) -> dict[str, Stream]:  # fmt: skip
    """The stream of each document, by its key."""
    pairs = _pairs(encoded)
    similar = [[] for _ in pairs]
    if database is not None and vision.retrieval == PREPENDED:
        similar = _similar_captions(encoded, split_of, database, vision)
    shots, ordered = [[] for _ in pairs], list(pairs.values())
    if vision.shots:
        known = _known(pairs, split_of)
        embedding_be, captions = _embeddings(encoded, ordered), [pair.caption for pair in ordered]
        guarded = [] if vision.guard is None else known
        near = similar_pairs(embedding_be, captions, known, vision.shots, guard=vision.guard, guarded=guarded)
        shots = [[ordered[number] for number in found] for found in near]
    made = zip(pairs.items(), similar, shots, strict=True)
    found = {key: example(pair, texts, before, tokenizer) for (key, pair), texts, before in made}
    every = {document.key: document.parts for document in encoded.documents}
    return {key: found.get(key) or interleaved(parts, tokenizer) for key, parts in every.items()}


def _encoded_captions(
    encoded: Encoded, split_of: dict[str, str], *, vision: VisionConfig, database: Database | None,
    tokenizer: Tokenizer, tokens: int | None,
) -> np.ndarray | None:  # fmt: skip
    """(n, k, c): the captions retrieved for each image of a pair; None if the model encodes none."""
    if database is None or tokens is None:
        return None
    shape = vision.retrieved, tokens
    found_nkc = np.full((len(encoded.features_npv), *shape), tokenizer.pad_id, np.int32)
    similar = _similar_captions(encoded, split_of, database, vision)
    for pair, texts in zip(_pairs(encoded).values(), similar, strict=True):
        found_nkc[pair.image] = chunks(texts, shape, tokenizer)
    return found_nkc


def _pairs(encoded: Encoded) -> dict[str, Pair]:
    """The documents that are pairs, by their keys."""
    return {document.key: pair for document in encoded.documents if (pair := as_pair(document)) is not None}


def _known(pairs: dict[str, Pair], split_of: dict[str, str]) -> list[int]:
    """The numbers of the pairs that are learned."""
    return [number for number, key in enumerate(pairs) if split_of[key] == TRAIN]


def _embeddings(encoded: Encoded, pairs: Sequence[Pair]) -> np.ndarray:
    return encoded.embedding_ne[[pair.image for pair in pairs]] if pairs else np.zeros((0, 1))


def _similar_captions(
    encoded: Encoded, split_of: dict[str, str], database: Database, vision: VisionConfig
) -> list[list[str]]:
    """The captions retrieved for each pair. The copy guard is for those that are learned: held-out examples get what an
    image gets whose caption is not known yet."""
    pairs = _pairs(encoded)
    embedding_be, captions = _embeddings(encoded, list(pairs.values())), [pair.caption for pair in pairs.values()]
    guarded = [] if vision.guard is None else _known(pairs, split_of)
    found: list[list[str]] = [[] for _ in captions]
    others = sorted(set(range(len(captions))) - set(guarded))
    own = [captions[number] for number in guarded]
    for numbers, settings in ((guarded, {"guard": vision.guard, "captions": own}), (others, {})):
        query_be = np.asarray(embedding_be)[np.array(numbers, np.int64)]
        for number, hits in zip(numbers, retrieve(database, query_be, vision.retrieved, **settings), strict=True):
            found[number] = [hit.caption for hit in hits]
    if bare := sum(not one for one in found):
        print(f"nothing is retrieved for {bare} of {len(found)} images", file=sys.stderr)
    return found
