"""A page of images with their captions and what was retrieved for them."""

import base64
import html
import io
from pathlib import Path

from orogen.config.files import write_atomically
from orogen.report.page import document
from orogen.vision.run import Captioned, Outcome
from orogen.vision.transforms import decode

SIDE = 256  # pixels of a picture's longer side
STYLE = """
.captioned { display: flex; gap: 1em; margin: 1em 0; }
.captioned img { max-width: 256px; max-height: 256px; object-fit: contain; border: 1px solid lightgray; }
.captioned ol { color: gray; }
"""


def write_page(outcome: Outcome, file: Path) -> None:
    """Writes one file that needs no other, with the pictures reduced."""
    scores = [f"<p>{html.escape(name)} {value:.4f}</p>" for name, value in outcome.scores.items()]
    broken = [f"<p>left out: {html.escape(f'{name}: {why}')}</p>" for name, why in outcome.broken.items()]
    parts = [*scores, *(_item(one) for one in outcome.items), *broken]
    write_atomically(file, document("Captions", parts, style=STYLE).encode())


def _item(one: Captioned) -> str:
    hits = "".join(f"<li>{hit.score:.3f} {html.escape(hit.caption)}</li>" for hit in one.hits)
    known = "" if one.known is None else f"<p>reference: {html.escape(one.known)}</p>"
    picture = f'<img alt="{html.escape(one.name)}" src="data:image/png;base64,{_picture(one.image)}">'
    shots = "".join(f"<p>example: {html.escape(shot)}</p>" for shot in one.shots)
    text = f"<b>{html.escape(one.caption)}</b>{known}<ol>{hits}</ol>{shots}"
    return f'<div class="captioned">{picture}<div><p>{html.escape(one.name)}</p>{text}</div></div>'


def _picture(data: bytes) -> str:
    image = decode(data)
    image.thumbnail((SIDE, SIDE))
    held = io.BytesIO()
    image.save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()
