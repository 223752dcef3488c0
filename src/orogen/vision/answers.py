"""Answers to what is said with images: `orogen generate --image`, and chats of `orogen serve`
(`infer/serve/pictures.py`).

What was said stands one after another, as examples of training do, without a chat template: bos; a text, with a line's
end unless it is the last; an image, with the captions that its database has of similar ones. An image alone is thus a
request for its caption.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from orogen.checkpoint.open import Opened, open_folder, open_model
from orogen.config.checks import ConfigError
from orogen.infer.sight import Seen
from orogen.vision.database import Database, Hit
from orogen.vision.describe import Captioner, Prompt
from orogen.vision.encoder import open_encoder
from orogen.vision.examples import FIRST
from orogen.vision.retrieval import retrieve
from orogen.vision.run import check_encoder, read_seen
from orogen.vision.transforms import ImageError, decode

LEAST, MOST = 16, 1024  # tokens of an answer: programs have room for powers of two between


class Sight:
    """A captioner that answers; its weights are read when they are needed first. database: of captions, None for none.
    retrieved: captions of each image, None: as many as in training. Raises ConfigError for a folder that is no
    captioner's, or a database of another encoder."""

    def __init__(self, checkpoint: Path, database: Path | None = None, retrieved: int | None = None):
        seen = read_seen(checkpoint)
        self._encoder = open_encoder(seen.encoder)
        check_encoder(self._encoder, seen)
        self._retrieved = seen.retrieved if retrieved is None else retrieved
        if self._retrieved and database is None:
            raise ConfigError(
                f"the model was trained with {self._retrieved} retrieved captions; expected --database, or --retrieved "
                "0"
            )
        self._database = None if database is None or not self._retrieved else Database(database, self._encoder)
        self._token, self._checkpoint = seen.image_token, checkpoint
        self._captioners: dict[int, Captioner] = {}
        with open_folder(checkpoint) as folder:
            most = folder.config.retrieved_captions
        if most is not None and self._retrieved > most:
            raise ConfigError(f"retrieved is {self._retrieved}; expected at most {most}, which the model encodes")

    def open(self) -> "Sight":
        """Itself, once it has read the weights. Raises ConfigError for a model that sees no images."""
        self._captioner(LEAST)
        return self

    @functools.cached_property
    def _opened(self) -> Opened:
        return open_model(self._checkpoint)

    def __call__(self, said: Sequence[str | bytes], most: int) -> Seen:
        """The likeliest continuation of texts and images, of at most so many tokens. Raises ConfigError."""
        if not 0 < most <= MOST:
            raise ConfigError(f"max_tokens is {most}; expected 1 to {MOST} beside images")
        captioner = self._captioner(max(LEAST, 1 << (most - 1).bit_length()))
        images, hits = [one for one in said if isinstance(one, bytes)], []
        prompt = self._prompt(said, images, captioner, hits)
        (ids,) = captioner.continued([prompt])
        text, ended = captioner.text(ids[:most]), len(ids) < min(most, captioner.tokens)
        told = [{"image": number, **hit._asdict()} for number, found in enumerate(hits) for hit in found]
        return Seen(text, len(prompt.ids), min(len(ids) + ended, most), ended, told)

    def _captioner(self, tokens: int) -> Captioner:
        if tokens not in self._captioners:
            self._captioners[tokens] = Captioner(self._opened, self._token, tokens=tokens, batch=1)
        return self._captioners[tokens]

    def _prompt(
        self, said: Sequence[str | bytes], images: list[bytes], captioner: Captioner, hits: list[list[Hit]]
    ) -> Prompt:
        """hits: gets what was retrieved for each image."""
        pixels = []
        for number, data in enumerate(images):
            try:
                pixels.append(self._encoder.transform(decode(data)))
            except ImageError as error:
                raise ConfigError(f"image {number}: {error}; expected an image") from None
        encoded, words = self._encoder.encode_pixels(pixels), captioner.tokenizer
        hits += [[]] * len(images)
        if self._database is not None and images:
            hits[:] = retrieve(self._database, encoded.embedding_be, self._retrieved)
        encodes, ids, number = captioner.opened.config.retrieved_captions is not None, [words.bos_id], 0
        for place, one in enumerate(said):
            if isinstance(one, str):
                ids += words.encode_inside(one if place == len(said) - 1 else f"{one}\n").tolist()
                continue
            ids.append(FIRST + number)
            for hit in () if encodes else hits[number]:
                ids += words.encode_inside(f"{hit.caption}\n").tolist()
            number += 1
        captions = {place: [hit.caption for hit in found] for place, found in enumerate(hits)} if encodes else {}
        return Prompt([int(i) for i in ids], dict(enumerate(encoded.features_bpd)), captions)
