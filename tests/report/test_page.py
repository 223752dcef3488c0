"""The page of a run: what it says, what it leaves out, and the series that its pictures show."""

import base64
import html.parser
import json
import math
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from orogen.report import pictures, series
from orogen.report.metrics import MetricsWriter
from orogen.report.page import write_report
from orogen.report.rounding_page import section

PNG = b"\x89PNG\r\n\x1a\n"
BASELINES = {"Witten-Bell 5-gram": 1.9, "zlib of the held-out text alone": 3.0}


def sparse_records(steps: int = 40) -> list[dict[str, object]]:
    """Two MoE layers of three experts, a falling loss, held-out text scored every tenth step."""
    records = []
    for step in range(1, steps + 1):
        record = {"step": step, "loss": 2 + 6 / step, "tokens": 100, "tokens_per_second": 5000 + step}
        record |= {"step_ms": 2000.0, "expert_load": [[4, 4, 4], [0, 3, 9]], "dropped_tokens": 6, "mfu": 0.25}
        if step % 10 == 0:
            record |= {"heldout_loss": 3.0, "heldout_bits_per_byte": 1.5}
        records.append(record)
    return records


def without(records: list[dict[str, object]], *keys: str) -> list[dict[str, object]]:
    return [{key: value for key, value in record.items() if key not in keys} for record in records]


def write(run_dir: pathlib.Path, records: list[dict[str, object]], **changes: object) -> str:
    with MetricsWriter(run_dir) as writer:
        for record in records:
            writer.write(record)
    arguments = {"title": "A run", "config_text": "X.y = 1", "baselines": BASELINES, "samples": None, "environment": {}}
    return write_report(run_dir, **arguments | changes).read_text()


def pngs_beside(run_dir: pathlib.Path) -> set[str]:
    return {path.name for path in run_dir.glob("*.png")}


class Page(html.parser.HTMLParser):
    """Checks that tags close in order; collects what the page would load, and its headline."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.sources, self.cells = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("dt", "dd", "td"):
            self.cells.append(data)

    def headline(self, label: str) -> str:
        return self.cells[self.cells.index(label) + 1]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[pathlib.Path, str]:
    run_dir = tmp_path_factory.mktemp("run")
    environment = {"commit": "c0ffee", "parameters": {"total": 31_600_000, "active": 8_200_000}}
    texts = {
        "title": "A <b> run",
        "config_text": "A.b = '<c>'",
        "samples": "Once </pre> upon",
        "environment": environment,
    }
    return run_dir, write(run_dir, sparse_records(), **texts)


def test_every_picture_is_in_the_page_and_beside_it(full):
    run_dir, text = full
    assert pngs_beside(run_dir) == {"loss.png", "throughput.png", "expert_load.png", "dropped_tokens.png"}
    for path in run_dir.glob("*.png"):
        assert path.read_bytes().startswith(PNG)
        assert base64.b64encode(path.read_bytes()).decode() in text
    assert not list(run_dir.glob("*.tmp"))


def test_the_page_loads_nothing_and_is_well_formed(full):
    page = Page(full[1])
    assert len(page.sources) == 8  # four pictures, light and dark
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(|<script|<link", full[1])


def test_dark_and_light_pictures_differ(full):
    dark, light = Page(full[1]).sources[:2]
    assert dark != light


def test_every_picture_has_a_sentence(full):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", full[1])
    assert len(captions) == 4 and all(len(caption) > 80 for caption in captions)


def test_the_headline_holds_the_runs_numbers(full):
    page = Page(full[1])
    expected = {
        "held-out bits per byte": "1.500",
        "held-out loss, nats per token": "3.000",
        "training loss, nats per token": "2.150",  # 2 + 6/40: over 40 records the running mean's window is one
        "tokens": "4k",
        "steps": "40",
        "parameters, total": "31.6M",
        "parameters, active": "8.2M",
        "time in steps": "1 min 20 s",
        "tokens per second, median": "5,020",
        "model FLOPs utilisation, median": "25.0%",
        "assignments dropped": "25.00%",
    }
    assert {label: page.headline(label) for label in expected} == expected


def test_the_model_stands_among_its_baselines_best_first(full):
    cells = Page(full[1]).cells
    table = cells[cells.index("this model") :]
    assert table == ["this model", "1.500", "Witten-Bell 5-gram", "1.900", "21.1%", *table[5:]]
    assert table[5:] == ["zlib of the held-out text alone", "3.000", "50.0%"]


def test_texts_are_shown_as_text(full):
    for text in ("A &lt;b&gt; run", "A.b = &#x27;&lt;c&gt;&#x27;", "Once &lt;/pre&gt; upon", "c0ffee"):
        assert text in full[1]


@pytest.mark.parametrize(
    ("missing", "left_out"),
    [
        (["expert_load", "dropped_tokens"], {"expert_load.png", "dropped_tokens.png"}),
        (["dropped_tokens"], {"dropped_tokens.png"}),
        (["tokens_per_second", "step_ms", "mfu"], {"throughput.png"}),
        (["loss"], {"loss.png"}),
        (["heldout_loss", "heldout_bits_per_byte"], set()),
    ],
)
def test_a_missing_number_drops_its_picture_alone(tmp_path, missing, left_out):
    Page(write(tmp_path, without(sparse_records(12), *missing)))
    everything = {"loss.png", "throughput.png", "expert_load.png", "dropped_tokens.png"}
    assert pngs_beside(tmp_path) == everything - left_out


def test_a_run_of_no_steps_has_a_page(tmp_path):
    text = write(tmp_path, [])
    assert pngs_beside(tmp_path) == set() and "Configuration" in text and "Samples" not in text


def test_a_run_of_one_step_has_its_pictures(tmp_path):
    Page(write(tmp_path, sparse_records(1)))
    assert len(pngs_beside(tmp_path)) == 4


def test_a_loss_that_is_not_finite_is_counted_and_left_out(tmp_path):
    records = sparse_records(20)
    records[4]["loss"], records[5]["loss"] = math.nan, math.inf
    page = Page(write(tmp_path, records))
    assert page.headline("steps whose loss is not finite") == "2"
    assert page.headline("training loss, nats per token") == "2.300"


def test_a_folder_without_metrics_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path, title="", config_text="", baselines={}, samples=None, environment={})


def drawn_loss(records, baselines):
    picture = pictures.pictures(records, baselines)[0]
    assert picture.name == "loss"
    return picture.draw(pictures.LIGHT).axes[0]


def test_training_loss_is_drawn_in_the_held_out_texts_bits_per_byte():
    """3 nats per token are 1.5 bits per byte, so a training loss of 2 + 6/40 is half of that."""
    axes = drawn_loss(sparse_records(), BASELINES)
    raw, mean, heldout = (line.get_ydata() for line in axes.lines[:3])
    assert axes.get_ylabel() == "bits per byte"
    assert raw[-1] == mean[-1] == pytest.approx((2 + 6 / 40) / 2)
    assert list(heldout) == [1.5] * 4


def test_loss_is_drawn_over_the_tokens_seen_so_far():
    axes = drawn_loss(sparse_records(), BASELINES)
    assert list(axes.lines[0].get_xdata()[:3]) == [100, 200, 300]
    assert list(axes.lines[2].get_xdata()) == [1000, 2000, 3000, 4000]


def test_baselines_are_drawn_at_their_values_and_named():
    axes = drawn_loss(sparse_records(), BASELINES)
    assert [line.get_ydata()[0] for line in axes.lines[3:]] == [1.9, 3.0]
    assert [text.get_text() for text in axes.texts] == [f"{name} {value:.2f}" for name, value in BASELINES.items()]
    low, high = axes.get_ylim()
    assert low < 1.075 and 3.0 < high < 4.0  # shows the whole end of the run, not the first step's 4 bits per byte


def test_names_of_close_baselines_do_not_overlap():
    axes = drawn_loss(sparse_records(), {"a": 2.0, "b": 2.001, "c": 2.002})
    heights = [text.get_position()[1] for text in axes.texts]
    assert np.diff(heights).min() >= 0.055 - 1e-9


def test_without_held_out_bits_the_axis_is_nats_and_has_no_baselines():
    axes = drawn_loss(without(sparse_records(), "heldout_bits_per_byte"), BASELINES)
    assert axes.get_ylabel() == "nats per token" and not axes.texts
    assert axes.lines[0].get_ydata()[-1] == 2 + 6 / 40
    assert list(axes.lines[2].get_ydata()) == [3.0] * 4


def test_running_mean_is_centred_and_skips_what_is_not_finite():
    values_n = np.arange(150.0)  # a window of three
    values_n[10] = math.nan
    mean_n = series.running_mean(values_n)
    assert mean_n[50] == 50 and mean_n[0] == 0.5 and mean_n[10] == 10 and mean_n[9] == 8.5
    assert np.isnan(series.running_mean(np.full(3, math.nan))).all()


def test_load_over_even_by_hand():
    """Steps 1 and 2 in one span, 5 in another; layer 1 has loads (1, 3) + (1, 3), then (6, 2)."""
    loads = {1: [1, 3], 2: [1, 3], 5: [6, 2]}
    records = [{"step": step, "expert_load": [[9, 9], load]} for step, load in loads.items()]
    load_ec = series.load_over_even(records, 1, np.array([1.0, 3.0, 5.0, 7.0]))
    np.testing.assert_allclose(load_ec, [[0.5, math.nan, 1.5], [1.5, math.nan, 0.5]])


def test_dropped_share_is_of_all_layers_assignments():
    load = [[4, 4], [1, 1]]
    counted = [{"step": 1, "expert_load": load, "dropped_tokens": 2}, {"step": 2, "dropped_tokens": 2}]
    by_layer = {"step": 3, "expert_load": load, "dropped_tokens": [3, 1]}
    steps_n, share_n = series.dropped_share([*counted, by_layer])
    assert list(steps_n) == [1, 3] and list(share_n) == [0.2, 0.4]


def test_the_fullest_expert_and_the_idle_ones_are_named():
    caption = next(p.caption for p in pictures.pictures(sparse_records(), {}) if p.name == "expert_load")
    assert "2.25 times an even share (layer 1, expert 2), and 1 of 6 experts got nothing" in caption


@pytest.mark.parametrize(("layers", "panels"), [(1, 1), (5, 6), (40, 40)])
def test_every_layer_has_a_panel(layers, panels):
    records = [{"step": step, "expert_load": [[1, 2, 3]] * layers} for step in (1, 2)]
    figure = pictures.pictures(records, {})[0].draw(pictures.DARK)
    shown = [axes.get_title(loc="left") for axes in figure.axes if axes.images]
    assert shown == [f"layer {layer}" for layer in range(layers)]
    assert len(figure.axes) == panels + 1  # the colour scale


def test_half_and_twice_an_even_share_are_equally_far_from_even():
    records = [{"step": 1, "expert_load": [[2, 4, 8, 2]]}]
    axes = pictures.pictures(records, {})[0].draw(pictures.LIGHT).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array()[:, 0], [-1, 0, 1, -1])
    assert axes.images[0].get_clim() == (-2, 2)


def test_short_numbers():
    values = (0.5, 12, 1234, 1_234_567, 31_600_000_000, 2.5e13)
    assert [series.short_number(v) for v in values] == ["0.5", "12", "1.23k", "1.23M", "31.6B", "25T"]


def test_importing_the_report_loads_neither_matplotlib_nor_jax():
    script = "import sys, orogen.report.page; print([m for m in ('matplotlib', 'jax') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_drawing_imports_no_pyplot():
    script = (
        "import sys; from orogen.report import pictures\n"
        "records = [{'step': 1, 'loss': 2.0, 'tokens': 3, 'expert_load': [[1, 2]], 'dropped_tokens': 1}]\n"
        "for picture in pictures.pictures(records, {}): pictures.png(picture.draw(pictures.LIGHT))\n"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out == "True False\n"


def test_the_table_of_a_step_is_shown_if_there_is_one(tmp_path):
    row = {"part": "", "phase": "forward", "exposed_ms": 1.5, "waiting_ms": 0.25, "hidden_ms": 0.125, "count": 2}
    table = {
        "steps": 3,
        "devices": {
            "GPU:<0>": {"step_ms": 8.0, "compute_ms": 6.0, "exposed_ms": 1.5, "waiting_ms": 0.25, "hidden_ms": 0.125,
                        "idle_ms": 0.5},
        },
        "compute": [{"kind": "MoE", "part": "experts", "phase": "backward", "ms": 5.997},
                    {"kind": "MLP", "part": "up", "phase": "forward", "ms": 0.003}],
        "communication": [{"operation": "all-reduce", "kind": "optimizer", **row}],
        "unknown": [],
    }  # fmt: skip
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "table.json").write_text(json.dumps(table))
    text = write(tmp_path, [{"step": 1}])
    cells = Page(text).cells
    start = cells.index("GPU:<0>")
    assert cells[start : start + 7] == ["GPU:<0>", "8.00", "6.00", "1.50", "0.25", "0.12", "0.50"]
    assert cells[start + 7 :][:8] == ["MoE", "experts", "backward", "5.997", "75.0%", "rest", "0.003", "0.0%"]
    assert cells[start + 15 :][:7] == ["all-reduce", "optimizer", "forward", "1.500", "0.250", "0.125", "2"]
    assert "Means over 3 steps" in text
    assert "Where a step" not in write(tmp_path / "other", [{"step": 1}])


def test_scales_have_a_history_of_five_steps():
    """The first and the last measured step, and three between them; a dash where an operand was not rounded."""

    def record(step, scales):
        shares = {operand: {"0": 0.25, "3": 0.5} for operand in scales}
        names = "rounding_flushed", "rounding_saturated", "rounding_zeros"
        return {"step": step, **dict.fromkeys(names, shares), "rounding_log2_scale": scales}

    steps = [record(10 * k, {"mamba_in.forward.x": {"0": -k, "3": -k - 1.0, "5": None}}) for k in range(9)]
    text = section([{"step": 5}, *steps, record(90, {"mamba_in.forward.x": {"0": -9.0, "3": None}, "new": {"0": 2.0}})])
    assert "Rounding at step 90" in text
    # Measured steps 0 to 9: places 0, 2, 4, 7 and 9.
    assert ">-0.5, -2.5, -4.5, -7.5, -9.0</td>" in text and ">–, –, –, –, 2.0</td>" in text
    assert ">-3.0</td>" in section([record(1, {"mamba_in.forward.x": {"0": -3.0}})])
