"""The page of a prediction: what it says, that it stands alone, and what its pictures show."""

import dataclasses
import itertools
import json
import random
import re
import xml.etree.ElementTree as ElementTree

import pytest

from orogen.cli import main
from orogen.parallel.schedule import BACKWARD, FORWARD
from orogen.simulate.page import headline, traffic_grid, write_page
from orogen.simulate.pictures import (
    MAX_PASSES,
    Candidate,
    Scaled,
    draw_memory,
    draw_time,
    draw_timeline,
    pareto,
    pictures,
)
from orogen.simulate.prediction import TIME_PARTS, Prediction, Roofline, StageMemory, Traffic
from orogen.simulate.timeline import Work

GIB = 2**30


def prediction(**changes: object) -> Prediction:
    """Two stages of unequal memory; times and sizes are round numbers."""
    facts = {
        "step_seconds": 0.5, "tokens_per_second": 32_000.0, "tokens_per_second_per_device": 4_000.0, "mfu": 0.375,
        "tflops_per_device": 371.0, "flops": {"orogen": 1.5e15, "megatron2024": 1.6e15}, "hardware": "h100",
        "devices": 8, "routing": "balanced", "imbalance": 1.0, "device_memory_bytes": 3.0 * GIB,
        "memory_limit_bytes": 80.0 * GIB,
        "memory": (
            StageMemory(0, {"parameters": GIB, "activations": 2.0 * GIB}, 0.0),
            StageMemory(1, {"parameters": GIB, "activations": 0.0}, GIB / 2),
        ),
        "rooflines": (
            Roofline("M", "in_proj", "forward", 2e12, 4e9, 2e-3, 1e-3, 2e-3, 10),
            Roofline("*", "core", "backward", 1e11, 8e9, 1e-4, 2e-3, 2e-3, 5),
        ),
        "communication": (
            Traffic(("tensor",), "all_gather", "node", 1e9, 0.004, 0.001),
            Traffic(("data", "context"), "reduce_scatter", "network", 2e9, 0.04, 0.0),
        ),
        "timeline": (
            Work(0, FORWARD, 0, 0, 0.0, 0.1), Work(1, FORWARD, 0, 0, 0.1, 0.2), Work(1, BACKWARD, 0, 0, 0.2, 0.4),
            Work(0, BACKWARD, 0, 0, 0.4, 0.5),
        ),
        "bubble": 0.25, "seconds": {"compute": 0.3, "tensor": 0.05, "bubble": 0.15}, "limit": "The pipeline limits it.",
    }  # fmt: skip
    return Prediction(**facts | changes)


SCALED = [Scaled("weak", 8, 32_000.0), Scaled("weak", 16, 60_000.0), Scaled("strong", 16, 50_000.0)]
CANDIDATES = [Candidate("data=8", 2.0 * GIB, 100.0, True), Candidate("data=4;tensor=2", GIB, 90.0, False)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "plan.html"
    title = "<Nano> & co"
    write_page(
        path, title=title, prediction=prediction(), config_text="X.y = '<1>'", scaled=SCALED, candidates=CANDIDATES
    )
    return path.read_text()


def test_the_page_needs_no_network(page):
    addresses = set(re.findall(r"[a-z]+://[^\s\"'<>]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, which nobody fetches
    assert "<script" not in page and "@import" not in page and "<link" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page)


def test_texts_are_escaped(page):
    assert "<h1>&lt;Nano&gt; &amp; co</h1>" in page and "X.y = &#x27;&lt;1&gt;&#x27;" in page
    assert "<Nano>" not in page


def test_every_picture_is_there_and_follows_the_theme(page):
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Timeline of the pipeline", "Where a step&#x27;s time goes", "Memory by stage", "Roofline by layer", "Scaling",
        "Speed against memory",
    ]  # fmt: skip
    for picture in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(picture)
        assert "var(--ink)" in picture and "#24292f" not in picture and "#ffffff" not in picture


def test_pictures_share_no_reference(page):
    """A reference in one picture must not find another's clip path or marker."""
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    used = [set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", picture)) for picture in pictures]
    used = [{a or b for a, b in found} for found in used]
    for one, other in itertools.combinations(range(len(pictures)), 2):
        defined = set(re.findall(r'\bid="([^"]+)"', pictures[other]))
        assert not used[one] & defined


def test_texts_under_the_pointer_have_the_numbers(page):
    tips = set(re.findall(r"<title>(.*?)</title>", page))
    assert {
        "backward: stage 1, chunk 0, microbatch 0, 200.00 to 400.00 ms",
        "step, bubble: 150.0 ms",
        "stage 0, activations: 2.00 GiB",
        "M in_proj, forward: 2,000.0 GFLOP, 4,000.0 MB, 2.000 ms, compute bound; 10 times per step, 66.7% of all",
        "* core, backward: 100.0 GFLOP, 8,000.0 MB, 2.000 ms, memory bound; 5 times per step, 33.3% of all",
        "strong, 16 devices: 3,125 tokens/s per device, 50,000 in all",
        "data=4;tensor=2: 1.0 GiB, 90 tokens/s",
    } <= tips
    assert not any(tip.startswith("stage 1, activations") for tip in tips)  # there are none


def test_the_headline():
    found = headline(prediction(budget={"dollars": 1234.5}))
    assert found["seconds per step"] == "0.500" and found["model FLOPs utilisation"] == "37.5%"
    assert found["GiB of the fullest device"] == "3.0 of 80" and found["devices: h100"] == "8"
    assert found["dollars, all steps"] == "1,234" and "goodput: time that makes progress" not in found
    full = headline(prediction(device_memory_bytes=81.0 * GIB, goodput=0.9))
    assert full["GiB of the fullest device"] == "81.0 of 80: does not fit"
    assert full["goodput: time that makes progress"] == "90.0%"


def test_the_longest_communication_comes_first():
    heads, first, second = traffic_grid(prediction())
    assert first == ("data + context", "reduce_scatter", "network", "2.000", "40.00", "0.00")
    assert second == ("tensor", "all_gather", "node", "1.000", "4.00", "1.00")
    assert len(heads) == len(first)


def test_one_stage_has_no_timeline_and_nothing_unknown_is_drawn():
    alone = prediction(timeline=(Work(0, FORWARD, 0, 0, 0.0, 0.1),))
    assert [drawn.name for drawn in pictures(alone)] == ["time", "memory", "roofline"]


@pytest.mark.parametrize("microbatches, whole", [(MAX_PASSES // 2, True), (MAX_PASSES // 2 + 1, False)])
def test_a_long_step_shows_its_beginning_and_its_end(microbatches, whole):
    works = [Work(stage, FORWARD, m, 0, 1.0 * m, m + 1.0) for stage in (0, 1) for m in range(microbatches)]
    drawn = draw_timeline(works)
    assert len(drawn.figure.axes) == (1 if whole else 2)
    assert len(drawn.tips) <= MAX_PASSES + 4  # a pass at the edge of a window is in it
    assert f"stage 1, chunk 0, microbatch {microbatches - 1}, " in " ".join(drawn.tips.values())
    assert (f"Of {len(works):,} passes" in drawn.caption) == (not whole)


def test_bars_of_memory_are_as_long_as_their_parts():
    [axes] = draw_memory(prediction()).figure.axes
    bars = sorted((round(bar.get_y() + 0.4), bar.get_x(), bar.get_width()) for bar in axes.patches)
    assert bars == [(0, 0, 1), (0, 1, 2), (1, 0, 1)]
    assert axes.lines[0].get_xdata()[0] == 80


def test_every_part_of_the_time_has_a_bar():
    drawn = draw_time(prediction(seconds=dict.fromkeys(TIME_PARTS, 0.05)))
    assert [tip.split(",")[1].strip().split(":")[0] for tip in drawn.tips.values()] == list(TIME_PARTS)
    assert len({bar.get_facecolor() for bar in drawn.figure.axes[0].patches}) == len(TIME_PARTS)


def test_the_front_is_what_no_other_plan_beats():
    draw = random.Random(3)
    plans = [Candidate(str(i), draw.randint(1, 30), draw.randint(1, 30), False) for i in range(60)]
    beaten = lambda one: any(  # noqa: E731
        (other.memory_bytes, -other.tokens_per_second) != (one.memory_bytes, -one.tokens_per_second)
        and other.memory_bytes <= one.memory_bytes
        and other.tokens_per_second >= one.tokens_per_second
        for other in plans
    )
    best = {(plan.memory_bytes, plan.tokens_per_second) for plan in plans if not beaten(plan)}
    front = [(plan.memory_bytes, plan.tokens_per_second) for plan in pareto(plans)]
    assert front == sorted(best)


def test_a_prediction_is_not_changed_by_drawing():
    before = prediction()
    pictures(before, SCALED, CANDIDATES)
    assert dataclasses.asdict(before) == dataclasses.asdict(prediction())


RECIPE = ["simulate", "--gin_file", "gin_configs/recipes/quickstart.gin", "--json"]


def test_the_command_writes_the_page_of_the_best_plan_among_the_others(tmp_path, capsys):
    path = tmp_path / "plan.html"
    assert main([*RECIPE, "--search", "--devices", "2", "--html", str(path)]) == 0
    page, found = path.read_text(), json.loads(capsys.readouterr().out)
    assert f"{found['step_seconds']:,.3f}" in page and "<h1>quickstart on 2 x " in page
    assert "Speed against memory" in page and "TrainConfig.batch_size = " in page


@pytest.mark.parametrize("more, message", [(["--inference"], "without --inference"), ([], "Is a directory")])
def test_no_page_of_what_has_none(tmp_path, capsys, more, message):
    assert main([*RECIPE, *more, "--html", str(tmp_path)]) == 2
    answer = capsys.readouterr()
    assert answer.out == "" and message in answer.err and answer.err.count("\n") == 1
