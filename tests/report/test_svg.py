"""Figures as SVG: titles under the pointer, and what is refused."""

import re

import pytest

from orogen.report.pictures import LIGHT, plain_figure
from orogen.report.svg import svg


def figure():
    drawn, axes = plain_figure(LIGHT, height=1.0)
    axes.scatter([1.0], [2.0], gid="dot")
    return drawn


def test_a_tip_is_the_title_of_its_artist():
    text = svg(figure(), name="one", tips={"dot": "a < b"})
    assert re.search(r'<g id="dot"[^>]* class="tip"[^>]*>\s*<title>a &lt; b</title>', text)


def test_the_same_figure_gives_the_same_text():
    assert svg(figure(), name="one", tips={}) == svg(figure(), name="one", tips={})


def test_a_tip_without_an_artist_is_refused():
    with pytest.raises(ValueError, match="dott"):
        svg(figure(), name="one", tips={"dott": "?"})


def test_the_same_figure_under_another_name_has_other_ids():
    """Those that something refers to: of clip paths and markers."""
    ids = [set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg(figure(), name=name, tips={}))) for name in "ab"]
    assert ids[0] and not ids[0] & ids[1]
