"""A run on one page: `report.html` with its pictures inside, and the same pictures as PNG files beside it.

The page needs no network and follows the browser's light or dark setting. What a run did not record is left out.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orogen.config.files import write_atomically
from orogen.report import rounding_page
from orogen.report.goodput import goodput, time_spent
from orogen.report.lost import read_lost
from orogen.report.metrics import read_metrics
from orogen.report.pairs import pair_pictures
from orogen.report.pictures import DARK, LIGHT, Picture, pictures, png
from orogen.report.profile import TABLE
from orogen.report.profile_page import section
from orogen.report.rewards import answers_html, reward_pictures
from orogen.report.series import (
    Floats,
    Records,
    column,
    dropped_share,
    running_mean,
    short_number,
    tokens_seen,
)
from orogen.report.tasks import task_pictures


def write_report(
    run_dir: str | Path,
    *,
    title: str,
    config_text: str,
    baselines: Mapping[str, float],
    samples: str | None,
    environment: Mapping[str, Any],
) -> Path:
    """Writes `report.html` and its PNG files from `metrics.jsonl`; returns the page's path.

    `baselines` are bits per byte of the held-out text, by name. `environment` is shown as it is; if it has
    `parameters` (a number, or numbers by name, such as total and active), the headline shows them too.
    Raises FileNotFoundError if the run has no metrics file.
    """
    run_dir, records = Path(run_dir), read_metrics(run_dir)
    spent = time_spent(records, read_lost(run_dir))
    drawn = (*pictures(records, baselines), *pair_pictures(records), *reward_pictures(records), *task_pictures(records))
    figures = [figure_html(run_dir, picture) for picture in drawn]
    texts = [
        rounding_page.section(records),
        _profile_html(run_dir / "profile" / TABLE),
        answers_html(run_dir),
        text_html("Samples", samples, state="open"),
        text_html("Configuration", config_text, state=""),
        text_html("Environment", json.dumps(environment, indent=2, default=str), state=""),
    ]
    headings = headline_html(_headline(records, environment) | _goodput(spent))
    baseline = _baselines_html(_whole_heldout(records), baselines)
    page = document(title, [headings, baseline, *figures, _spent_html(spent), *texts])
    path = run_dir / "report.html"
    write_atomically(path, page.encode())
    return path


def _headline(records: Records, environment: Mapping[str, Any]) -> dict[str, str]:
    """The numbers that people ask for first, by label; what the run did not record is left out."""
    dropped_n = dropped_share(records)[1]
    facts = [
        ("held-out bits per byte", _whole_heldout(records), "{:.3f}".format),
        ("held-out loss, nats per token", _last(column(records, "heldout_loss")), "{:.3f}".format),
        ("training loss, nats per token", _last(running_mean(column(records, "loss"))), "{:.3f}".format),
        ("tokens", _last(tokens_seen(records)), short_number),
        ("steps", _last(column(records, "step")), "{:,.0f}".format),
        *((label, count, short_number) for label, count in _parameters(environment).items()),
        ("time in steps", _of_finite(np.sum, column(records, "step_ms") / 1000), _duration),
        ("tokens per second, median", _of_finite(np.median, column(records, "tokens_per_second")), "{:,.0f}".format),
        ("model FLOPs utilisation, median", _of_finite(np.median, column(records, "mfu")), "{:.1%}".format),
        ("rounded to zero, worst operand and layer", _last(column(records, "most_flushed")), "{:.2%}".format),
        ("cosine to the unrounded gradient, worst layer", _last(column(records, "least_cosine")), "{:.4f}".format),
        ("assignments dropped", _of_finite(np.mean, dropped_n), "{:.2%}".format),
        ("skipped steps", _last(column(records, "skipped_steps")), "{:,.0f}".format),
        ("steps whose loss is not finite", _count_lost(records) or None, "{:,.0f}".format),
    ]
    return {label: show(value) for label, value, show in facts if value is not None}


def _goodput(spent: Mapping[str, float]) -> dict[str, str]:
    share = goodput(spent)
    return {} if share is None else {"goodput: time in steps that were kept": f"{share:.1%}"}


def _parameters(environment: Mapping[str, Any]) -> dict[str, float | None]:
    counts = environment.get("parameters")
    if isinstance(counts, Mapping):
        return {f"parameters, {name}": count for name, count in counts.items()}
    return {"parameters": counts}


def _whole_heldout(records: Records) -> float | None:
    """Bits per byte of the whole held-out text, scored at the end; without that score, of the last sample of it."""
    whole = _last(column(records, "whole_heldout_bits_per_byte"))
    return _last(column(records, "heldout_bits_per_byte")) if whole is None else whole


def _last(values_n: Floats) -> float | None:
    return _of_finite(lambda finite_n: finite_n[-1], values_n)


def _of_finite(reduce: Any, values_n: Floats) -> float | None:
    finite_n = values_n[np.isfinite(values_n)]
    return float(reduce(finite_n)) if len(finite_n) else None


def _count_lost(records: Records) -> int:
    return sum(r.get("loss") is not None and not np.isfinite(r["loss"]) for r in records)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def document(title: str, parts: Sequence[str], *, style: str = "") -> str:
    """A whole page of these parts, which are HTML. style: rules beside those that all pages have."""
    return _PAGE.format(title=html.escape(title), style=STYLE + style, body="\n".join(parts))


def headline_html(facts: Mapping[str, str]) -> str:
    """The numbers that people ask for first, by label, as a part of a page."""
    cells = (f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>" for label, value in facts.items())
    return f'<dl class="headline">{"".join(cells)}</dl>'


def _baselines_html(model: float | None, baselines: Mapping[str, float]) -> str:
    """A table of the model among its baselines, best first, and the share of each one's bits that the model saves."""
    if not baselines:
        return ""
    scores = {**baselines, **({} if model is None else {"this model": model})}
    best_first = sorted(scores.items(), key=lambda score: score[1])
    body = "".join(_baseline_row(name, value, model) for name, value in best_first)
    heads = '<th>on the held-out text</th><th class="number">bits per byte</th><th class="number">model saves</th>'
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _spent_html(spent: Mapping[str, float]) -> str:
    """A table of where the time went."""
    if not spent:
        return ""
    total = sum(spent.values())
    body = "".join(
        f'<tr><td>{html.escape(what)}</td><td class="number">{seconds:,.1f}</td>'
        f'<td class="number">{seconds / total:.1%}</td></tr>'
        for what, seconds in spent.items()
    )
    heads = '<th>where the time went</th><th class="number">seconds</th><th class="number">share</th>'
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _baseline_row(name: str, value: float, model: float | None) -> str:
    is_model = model is not None and name == "this model"
    saved = "" if model is None or is_model else f"{1 - model / value:.1%}"
    mark = ' class="model"' if is_model else ""
    return (
        f'<tr{mark}><td>{html.escape(name)}</td><td class="number">{value:.3f}</td><td class="number">{saved}</td></tr>'
    )


def figure_html(run_dir: Path, picture: Picture) -> str:
    """Draws the picture in both themes, writes the light one to a file, and returns its part of the page."""
    light, dark = png(picture.draw(LIGHT)), png(picture.draw(DARK))
    write_atomically(run_dir / f"{picture.name}.png", light)
    heading = html.escape(picture.heading)
    return (
        f"<section><h2>{heading}</h2><figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_url(dark)}">'
        f'<img src="{_data_url(light)}" alt="{heading}">'
        f"</picture><figcaption>{html.escape(picture.caption)}</figcaption></figure></section>"
    )


def _profile_html(file: Path) -> str:
    """Where a step's time goes, if some were traced."""
    return section(json.loads(file.read_text())) if file.is_file() else ""


def _data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def text_html(heading: str, text: str | None, *, state: str) -> str:
    """A text under a heading that a click opens; state: `open` or empty."""
    if not text:
        return ""
    return f"<details {state}><summary>{heading}</summary><pre>{html.escape(text)}</pre></details>"


STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #ffffff; --ink: #24292f; --quiet: #59636e;
  --line: #dfe3e8; --accent: #1f5fae; }
@media (prefers-color-scheme: dark) { :root { --ground: #0d1117; --card: #161b22; --ink: #d5dae1; --quiet: #9198a1;
  --line: #30363d; --accent: #6cb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2, summary { font-size: 1.1rem; font-weight: 600; margin: 0 0 .6rem; }
section, table, details, .headline { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  margin: 0 0 1.25rem; padding: 1.1rem 1.25rem; }
.headline { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr)); gap: 1.1rem 1.5rem; }
.headline div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
dt { color: var(--quiet); font-size: .82rem; line-height: 1.3; }
dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
table { border-spacing: 0; width: 100%; }
th { color: var(--quiet); font-size: .82rem; font-weight: 400; text-align: left; }
td { border-top: 1px solid var(--line); padding: .3rem 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.model td { color: var(--accent); font-weight: 600; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
figcaption { color: var(--quiet); font-size: .88rem; margin-top: .7rem; max-width: 52rem; }
summary { cursor: pointer; margin: 0; }
pre { font: .82rem/1.5 ui-monospace, monospace; margin: .8rem 0 0; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
