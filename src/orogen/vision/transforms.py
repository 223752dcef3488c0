"""Images as a vision model takes them: decoded within limits, resized, cropped and normalised as its
preprocessor_config.json says.

Letters: y x rows and columns of pixels, c colours.
"""

import dataclasses
import io
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.json_file import ListOf, Number, Record, Whole, check_form
from orogen.data.interleaved import MAX_BYTES

OVERSHOOT = 1.5  # times white: filters that resize and sharpen leave values beyond it
MAX_PIXELS = 50_000_000  # of an image before it is resized: 200 MB decoded
# Those whose endings a corpus may have. Pillow would have Ghostscript run a PostScript file, whatever its ending.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SIDE = Whole(1, 2**14)
SQUARE = Record({"height": SIDE, "width": SIDE})
FORM = Record(
    {"size": (SIDE, Record({"shortest_edge": SIDE}), SQUARE), "image_mean": ListOf(Number(), 3),
     "image_std": ListOf(Number(), 3)},
    {"do_resize": bool, "do_center_crop": bool, "do_rescale": bool, "do_normalize": bool, "rescale_factor": Number(),
     "crop_size": (SIDE, SQUARE), "resample": Whole(0, 5)},
)  # fmt: skip


_OBJECT = re.compile(r" <[^>]* object at 0x[0-9a-f]+>")  # which Pillow names in place of a file


class ImageError(ValueError):
    """An image that cannot be used. The message says why, in one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """What an image goes through. edge: pixels of the shorter side after resizing, or None; size: (height, width) after
    resizing, or None; crop: (height, width) of the centre, or None; resample: Pillow's number of the filter."""

    edge: int | None
    size: tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Any) -> np.ndarray:
        """Normalised pixels (y, x, 3), float32, of a Pillow image in RGB."""
        image = self._resized(image)
        pixels_yxc = np.asarray(image, np.uint8)
        if self.crop is not None:
            pixels_yxc = _centre(pixels_yxc, self.crop)
        scaled_yxc = pixels_yxc.astype(np.float64) * self.scale
        return ((scaled_yxc - self.mean) / self.std).astype(np.float32)

    def _resized(self, image: Any) -> Any:
        if self.size is not None:
            return image.resize(self.size[::-1], resample=self.resample)
        if self.edge is None:
            return image
        width, height = image.size
        short, long = min(width, height), max(width, height)
        longer = int(self.edge * long / short)
        if longer > MAX_PIXELS // self.edge:
            raise ImageError(f"the image is {width} x {height}; expected sides that differ less")
        return image.resize((self.edge, longer) if width <= height else (longer, self.edge), resample=self.resample)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) of what it gives; None if that depends on the image."""
        return self.crop or self.size


def read_transform(facts: Mapping[str, Any], *, where: str) -> Transform:
    """The transform of a preprocessor_config.json. Raises ConfigError."""
    check_form(facts, FORM, where=where)
    does = lambda name, default=True: facts.get(f"do_{name}", default)  # noqa: E731
    size, crop = facts["size"], facts.get("crop_size")
    edge = size if isinstance(size, int) else size.get("shortest_edge")
    whole = None if isinstance(size, int) or "height" not in size else (size["height"], size["width"])
    square = (crop, crop) if isinstance(crop, int) else crop and (crop["height"], crop["width"])
    if does("center_crop", default=False) and square is None:
        raise ConfigError(f"{where}: crop_size is missing; expected one, since do_center_crop is true")
    std = facts["image_std"]
    if min(std) <= 0:
        raise ConfigError(f"{where}: image_std is {std}; expected numbers above 0")
    normal = does("normalize")
    return Transform(
        edge=edge if does("resize") else None, size=whole if does("resize") else None,
        crop=square if does("center_crop", default=False) else None, resample=facts.get("resample", 3),
        scale=facts.get("rescale_factor", 1 / 255) if does("rescale") else 1.0,
        mean=tuple(facts["image_mean"]) if normal else (0.0,) * 3, std=tuple(std) if normal else (1.0,) * 3,
    )  # fmt: skip


def decode(data: bytes) -> Any:
    """The image of a file's bytes, as a Pillow image in RGB, upright as its EXIF orientation says.

    Of an animation it is the first frame; CMYK, palettes, grey and 16 bits become RGB; transparency is put on white.
    Raises ImageError if the bytes are no image of FORMATS, are cut short, are more than MAX_BYTES, or have no pixel or
    more than MAX_PIXELS.
    """
    Image, ImageOps = pillow()
    if len(data) > MAX_BYTES:
        raise ImageError(f"the file is too large; expected at most {MAX_BYTES:,} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked here
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if not 0 < width * height <= MAX_PIXELS:
                raise ImageError(f"the image is {width} x {height}; expected 1 to {MAX_PIXELS:,} pixels")
            image.load()
            return _rgb(ImageOps.exif_transpose(image), Image)
    except ImageError:
        raise
    except Exception as error:  # decoders raise almost anything on broken data
        why = _OBJECT.sub("", " ".join(str(error).split()))
        raise ImageError(f"it cannot be decoded ({type(error).__name__}: {why})") from error


def _rgb(image: Any, Image: Any) -> Any:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # Pillow would cut values off at 255
        values_yx = np.asarray(image, np.float64)
        white = _white(image.mode, values_yx)
        shares_yx = np.nan_to_num(np.clip(values_yx, 0, white) / white)  # NaN is black
        return Image.fromarray((shares_yx * 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _white(mode: str, values_yx: np.ndarray) -> float:
    """The value of white: the most that 16 bits hold. Images of 32 bits and of floats do not say theirs. The guess is
    the least of 1 (of floats), 255 and 65535 that no finite value exceeds by more than OVERSHOOT."""
    if mode.startswith("I;16"):
        return 65535.0
    brightest = values_yx.max(initial=0, where=np.isfinite(values_yx))
    guesses = (1.0, 255.0) if mode == "F" else (255.0,)
    return next((white for white in guesses if brightest <= OVERSHOOT * white), 65535.0)


def pillow() -> tuple[Any, Any]:
    """Pillow's Image and ImageOps. Raises ConfigError if it is not installed."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ConfigError("Pillow is not installed; expected it: pip install 'orogen[vision]'") from error
    return Image, ImageOps


def _centre(pixels_yxc: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
    """The centre, with black around an image that is smaller, as transformers crops: an odd pixel of a larger image is
    cut off at its end."""
    for axis, wanted in enumerate(crop):
        have = pixels_yxc.shape[axis]
        if have < wanted:
            before = -(-(wanted - have) // 2)
            around = [(0, 0)] * 3
            around[axis] = (before, wanted - have - before)
            pixels_yxc = np.pad(pixels_yxc, around)
        else:
            start = (have - wanted) // 2
            pixels_yxc = np.take(pixels_yxc, range(start, start + wanted), axis)
    return pixels_yxc
