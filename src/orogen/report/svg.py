"""Figures as parts of a page: SVG that follows the page's light or dark setting, with a text under the pointer."""

import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import TYPE_CHECKING

from orogen.report.pictures import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# Colours of the light theme that the page has in both themes, as variables of its style.
VARIABLES = {LIGHT.ground: "--card", LIGHT.ink: "--ink", LIGHT.grid: "--line", LIGHT.strong: "--accent"}


def svg(figure: "Figure", *, name: str, tips: Mapping[str, str]) -> str:
    """The figure, drawn in the light theme, as an element of a page.

    name: part of all ids, since the pictures of a page share one space of them. tips: by an artist's gid, the text that
    a browser shows under the pointer. Raises ValueError if an artist with such a gid was not drawn.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", LINK)
    root = ElementTree.fromstring(file.getvalue())
    for size in ("width", "height"):
        del root.attrib[size]  # the page decides; viewBox has the proportions
    root.set("role", "img")
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    _add_tips(root, tips)
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text


def _add_tips(root: ElementTree.Element, tips: Mapping[str, str]) -> None:
    found = {element.get("id"): element for element in root.iter()}
    if missing := sorted(tips.keys() - found.keys()):
        raise ValueError(f"tips for artists that are not in the figure: {missing[:3]}")
    for gid, tip in tips.items():
        title = ElementTree.Element(f"{{{SVG}}}title")
        title.text = tip
        found[gid].insert(0, title)
        found[gid].set("class", "tip")
