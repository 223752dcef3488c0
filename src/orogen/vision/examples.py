"""Documents of text and images as token streams, with retrieved captions and similar pairs before each caption.

In a stream an image is one token, FIRST + its number, until a batch is packed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.vision import PAD, VisionConfig
from orogen.data.packing import Stream
from orogen.data.tokenizer import Tokenizer

FIRST = 2**30  # beyond any vocabulary


class Pair(NamedTuple):
    """An image's number and its caption."""

    image: int
    caption: str


def image_token(tokenizer: Tokenizer, name: str) -> int:
    """The id of the token that stands for an image. Raises ConfigError if the tokenizer has no such special."""
    if name == PAD:
        return tokenizer.pad_id
    ids = tokenizer.marker_ids(name)
    if len(ids) != 1:
        raise ConfigError(f"VisionConfig.image_token is {name!r}; expected one special token of the tokenizer, or pad")
    return ids[0]


def prompt(image: int, similar: Sequence[str], shots: Sequence[Pair], tokenizer: Tokenizer) -> list[int]:
    """The tokens before a caption: bos; each shot, the least similar first: its image, its caption and a line's end;
    the image; and each retrieved caption with a line's end."""
    ids = [tokenizer.bos_id]
    for shot in shots:
        ids += [FIRST + shot.image, *tokenizer.encode_inside(f"{shot.caption}\n")]
    ids.append(FIRST + image)
    for caption in similar:
        ids += tokenizer.encode_inside(f"{caption}\n").tolist()
    return [int(one) for one in ids]


def example(pair: Pair, similar: Sequence[str], shots: Sequence[Pair], tokenizer: Tokenizer) -> Stream:
    """A pair as a stream that learns its caption and the end of the text."""
    before = prompt(pair.image, similar, shots, tokenizer)
    learned = [*tokenizer.encode_inside(pair.caption).tolist(), tokenizer.eos_id]
    weights_t = np.repeat(np.array([0, 1], np.float32), [len(before), len(learned)])
    return Stream(np.array([*before, *learned], np.int32), weights_t)


def chunks(captions: Sequence[str], shape: tuple[int, int], tokenizer: Tokenizer) -> np.ndarray:
    """(k, c) int32: retrieved captions as an encoder of captions takes them: tokens and the end of the text, cut off or
    padded to c; where there are fewer than k captions, padding."""
    found_kc = np.full(shape, tokenizer.pad_id, np.int32)
    for row_c, caption in zip(found_kc, captions[: shape[0]], strict=False):
        ids = [*tokenizer.encode_inside(caption).tolist(), tokenizer.eos_id][: shape[1]]
        row_c[: len(ids)] = ids
    return found_kc


def interleaved(parts: Sequence[str | int], tokenizer: Tokenizer) -> Stream:
    """A longer document as a stream that learns all its text."""
    ids, weights = [tokenizer.bos_id], [0.0]
    for part in parts:
        if isinstance(part, int):
            ids, weights = [*ids, FIRST + part], [*weights, 0.0]
        else:
            text = tokenizer.encode_inside(part).tolist()
            ids, weights = [*ids, *text], [*weights, *[1.0] * len(text)]
    return Stream(np.array([*ids, tokenizer.eos_id], np.int32), np.array([*weights, 1.0], np.float32))


def padded(stream: Stream, config: VisionConfig, *, length: int, pad_id: int) -> Stream | None:
    """The stream, padded so that a packed row of `length` tokens has at most images_per_row images. None if it has
    more, or does not fit into a row."""
    images = int((stream.tokens_t >= FIRST).sum())
    least = images * -(-length // config.images_per_row)
    missing = max(0, least - len(stream.tokens_t))
    if len(stream.tokens_t) + missing > length:
        return None
    tokens_t = np.concatenate([stream.tokens_t, np.full(missing, pad_id, np.int32)])
    return Stream(tokens_t, np.concatenate([stream.weights_t, np.zeros(missing, np.float32)]))
