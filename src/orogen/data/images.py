"""Images in packed rows: where each stands, which one each token sees, and how their features lie in a batch.

Pure numpy. Letters: b batch, t time, p feature vectors of an image, v their width, n numbers of a row's images.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from orogen.config.vision import CAPTIONS, FEATURES, IMAGE
from orogen.data.packing import Batch


class Placed(NamedTuple):
    """An image in a row: the position of the token that stands for it, its features (p, v), and the tokens (k, c) of
    its retrieved captions, for models that encode them."""

    position: int
    features_pv: np.ndarray
    caption_kc: np.ndarray | None = None


def images_seen(segments_t: np.ndarray, positions: Sequence[int]) -> np.ndarray:
    """(t,) int32: the image, 1, 2, …, that each token of a row sees: the latest at or before it in its own document, 0
    for none. positions: of the images, ascending. Source: Flamingo, arXiv:2204.14198, section 3.1.3."""
    first_t = np.diff(segments_t, prepend=segments_t[:1] - 1) != 0
    image_t = np.zeros(len(segments_t), np.int32)
    image_t[list(positions)] = np.arange(1, len(positions) + 1)
    start_t = np.maximum.accumulate(np.where(first_t, np.arange(len(segments_t)), 0))
    latest_t = np.maximum.accumulate(np.where(image_t > 0, np.arange(len(segments_t)), -1))
    seen_t = np.where(latest_t >= start_t, image_t[latest_t], 0)
    return np.where(segments_t == 0, 0, seen_t).astype(np.int32)


def with_images(
    batch: Batch, rows: Sequence[Sequence[Placed]], *, room: int, shape: tuple[int, int],
    caption_tokens: int | None = None,
) -> Batch:  # fmt: skip
    """The batch with the extras FEATURES, IMAGE and, for models that encode captions, CAPTIONS of these images, given
    row by row in the order of their positions.

    room: the most images of a row, equal for all batches of a run, so that they have one shape; shape: (p, v);
    caption_tokens: k · c, None for a model that encodes no captions. The numbers of a row's images lie one after
    another in w per token, w = ⌈room · p · v / t⌉, so that a batch has hardly more room than it needs; the resampler
    runs on ⌊t · w / (p · v)⌋ images, which is `room` unless a row has more tokens than an image has numbers. Raises
    ValueError if a row has more images than `room`.
    """
    (vectors, width), (count, length) = shape, batch.tokens_bt.shape
    image_bt = np.zeros((count, length), np.int32)
    for number, placed in enumerate(rows):
        if len(placed) > room:
            raise ValueError(f"row {number} has {len(placed)} images; expected at most {room}")
        image_bt[number] = images_seen(batch.segments_bt[number], [image.position for image in placed])
    features = [[image.features_pv for image in placed] for placed in rows]
    extras = {FEATURES: _spread(features, length, room, vectors * width, np.float32), IMAGE: image_bt}
    if caption_tokens is not None:
        captions = [[image.caption_kc for image in placed] for placed in rows]
        extras[CAPTIONS] = _spread(captions, length, room, caption_tokens, np.int32)
    return batch._replace(extras={**batch.extras, **extras})


def _spread(rows: Sequence[Sequence[np.ndarray | None]], length: int, room: int, size: int, dtype: Any) -> np.ndarray:
    """(b, t, w): the `size` numbers of each of a row's arrays, one array after another, over `length` positions."""
    flat_bn = np.zeros((len(rows), length * math.ceil(room * size / length)), dtype)
    for number, arrays in enumerate(rows):
        for index, array in enumerate(arrays):
            assert array is not None
            flat_bn[number, index * size : (index + 1) * size] = array.reshape(-1)
    return flat_bn.reshape(len(rows), length, -1)
