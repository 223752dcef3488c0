"""The page of a curation: what each stage removed, with examples, and pictures of stages, curve, lengths, languages."""

import functools
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orogen.config.files import write_atomically
from orogen.report.page import document, figure_html, headline_html, text_html
from orogen.report.pictures import Picture, Theme, add_legend, plain_figure
from orogen.report.series import short_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Facts = Mapping[str, Any]
LANGUAGES = 20  # in the picture; the rest is one bar


def write_page(out: str | Path, facts: Facts, *, config_text: str) -> Path:
    """Writes `report.html` and its pictures as PNG files into `out`; returns the page's path.

    facts: as `report.json` of a curation holds them.
    """
    out = Path(out)
    texts = [
        text_html("Configuration", config_text, state=""),
        text_html("Everything counted", json.dumps(facts, indent=2), state=""),
    ]
    tables = [_stages_html(facts["stages"]), _groups_html(facts), _broken_html(facts)]
    figures = [figure_html(out, picture) for picture in _pictures(facts)]
    parts = [headline_html(_headline(facts)), *tables, *figures, _examples_html(facts["stages"]), *texts]
    page = document("Curation", parts)
    path = out / "report.html"
    write_atomically(path, page.encode())
    return path


def _headline(facts: Facts) -> dict[str, str]:
    before, after = facts["stages"]["read"]["left"], facts["stages"]["write"]["left"]
    shown = {
        "documents read": f"{before['documents']:,}",
        "documents left": f"{after['documents']:,}",
        "bytes of text read": short_number(before["bytes"]),
        "bytes of text left": short_number(after["bytes"]),
        "of the bytes": f"{after['bytes'] / before['bytes']:.1%}" if before["bytes"] else "–",
        "records that cannot be read": f"{facts['broken']['records']:,}",
        "files": f"{facts['files']:,}",
        "files of other kinds, not read": f"{sum(facts['skipped_files'].values()):,}",
    }
    if quality := facts.get("classifier"):
        shown["classifier: accuracy on held-out texts"] = _share(quality.get("accuracy"))
        shown["classifier: area under its ROC curve"] = _share(quality.get("area"))
    if dedup := facts.get("dedup"):
        shown["groups of duplicates"] = f"{dedup['components']:,}"
        shown["documents of the largest group"] = f"{dedup['largest_component']:,}"
        shown["buckets compared with pivots alone"] = f"{dedup['large_buckets']:,}"
    if evaluation := facts.get("evaluation"):
        shown["n-grams of evaluation sets"] = f"{evaluation['ngrams']:,}"
    return shown


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _stages_html(stages: Facts) -> str:
    """One row per stage and one per reason below it."""
    lines = []
    for name, stage in stages.items():
        entered, left = stage["entered"], stage["left"]
        gone, removed = (sum(found[key] for found in stage["removed"].values()) for key in ("bytes", "documents"))
        cells = (left["documents"], left["bytes"], removed, gone)
        lines.append(_line(name, *cells, mark=' class="model"'))
        lines += [
            _line(f"· {reason}", None, None, found["documents"], found["bytes"])
            for reason, found in stage["removed"].items()
        ]
        trimmed = entered["bytes"] - left["bytes"] - gone
        if trimmed > 0:
            lines.append(_line("· cut out of documents that stay", None, None, None, trimmed))
        elif trimmed < 0:
            lines.append(_line("· added to documents", None, None, None, trimmed))
    heads = ("stage", "documents left", "bytes left", "documents removed", "bytes removed")
    return _table(heads, lines)


def _groups_html(facts: Facts) -> str:
    """Documents and bytes by source, before and after."""
    before = facts["stages"]["read"]["groups"].get("source", {})
    after = facts["stages"]["write"]["groups"].get("source", {})
    none = {"documents": 0, "bytes": 0}
    lines = []
    for name in facts["sources"]:
        first, last = before.get(name, none), after.get(name, none)
        lines.append(_line(name, first["documents"], first["bytes"], last["documents"], last["bytes"]))
    return _table(("source, by priority", "documents", "bytes", "documents left", "bytes left"), lines)


def _broken_html(facts: Facts) -> str:
    reasons = facts["broken"]["reasons"]
    lines = [_line(reason, count) for reason, count in reasons.items()]
    return _table(("cannot be read (all named in broken.jsonl)", "records or files"), lines) if lines else ""


def _examples_html(stages: Facts) -> str:
    """What was removed, a few documents for each reason."""
    parts = []
    for name, stage in stages.items():
        for reason, found in stage["removed"].items():
            text = "\n\n".join(f"{e['id']}\n{e['text']}" for e in found["examples"])
            parts.append(text_html(html.escape(f"{name}: {reason}, {found['documents']:,} documents"), text, state=""))
    return f"<section><h2>Examples of removed documents</h2></section>{''.join(parts)}" if parts else ""


def _table(heads: tuple[str, ...], lines: list[str]) -> str:
    cells = "".join(f'<th class="number">{head}</th>' for head in heads[1:])
    return f"<table><thead><tr><th>{heads[0]}</th>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _line(name: str, *values: int | None, mark: str = "") -> str:
    cells = "".join(f'<td class="number">{"" if value is None else f"{value:,}"}</td>' for value in values)
    return f"<tr{mark}><td>{html.escape(name)}</td>{cells}</tr>"


def _pictures(facts: Facts) -> list[Picture]:
    stages = facts["stages"]
    found = [
        Picture(
            "stages", "What is left after each stage",
            "Shares of the documents and of the bytes that were read.", functools.partial(_draw_stages, stages),
        ),
        Picture(
            "lengths", "Lengths of documents",
            "Documents by the bytes of their text, in powers of two, before the first stage and after the last.",
            functools.partial(_draw_lengths, stages),
        ),
    ]  # fmt: skip
    if dedup := facts.get("dedup"):
        caption = (
            f"Two documents become candidates if all {dedup['rows']} hashes of one of {dedup['bands']} bands agree. "
            "The line is the probability; the dots are measured with this run's hash functions, on "
            f"{dedup['pairs_per_point']} pairs of random sets each, whose index is planted; bars of two standard "
            "errors. Behind them: this run's candidates by estimated index. Those left of the dashed line are no "
            "duplicates."
        )
        found.append(Picture("curve", "Candidates by similarity", caption, functools.partial(_draw_curve, dedup)))
    languages = stages.get("language", {}).get("groups", {}).get("language")
    if languages:
        caption = "Documents by the language that was identified, before those in other languages are removed."
        draw = functools.partial(_draw_languages, languages)
        found.append(Picture("languages", "Languages", caption, draw))
    return found


def _draw_stages(stages: Facts, theme: Theme) -> "Figure":
    figure, axes = plain_figure(theme, height=0.8 + 0.42 * len(stages))
    first = stages["read"]["left"]
    y_n = np.arange(len(stages))
    for offset, key, colour in ((-0.2, "documents", theme.strong), (0.2, "bytes", theme.faint)):
        shares = [stage["left"][key] / first[key] if first[key] else 0.0 for stage in stages.values()]
        axes.barh(y_n + offset, shares, 0.38, color=colour, label=key)
        for y, share in zip(y_n, shares, strict=True):
            axes.text(share + 0.01, y + offset, f"{share:.1%}", color=theme.ink, fontsize=8, va="center")
    axes.set_yticks(y_n, list(stages))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(False, axis="y")
    add_legend(axes, theme, loc="lower right")
    return figure


def _draw_lengths(stages: Facts, theme: Theme) -> "Figure":
    figure, axes = plain_figure(theme, height=3.2)
    counts = [{int(bits): n for bits, n in stages[name]["lengths"].items()} for name in ("read", "write")]
    bits = sorted(set(counts[0]) | set(counts[1])) or [0]
    bits_n = np.arange(bits[0], bits[-1] + 1)
    for offset, count, colour, label in zip(
        (-0.2, 0.2), counts, (theme.faint, theme.strong), ("read", "left"), strict=True
    ):
        axes.bar(bits_n + offset, [count.get(int(b), 0) for b in bits_n], 0.4, color=colour, label=label)
    axes.set_xticks(bits_n, [f"{_bytes(2.0**b)}" for b in bits_n])
    axes.set_xlabel("bytes, less than")
    axes.set_ylabel("documents")
    axes.yaxis.set_major_formatter(short_number)
    axes.grid(False, axis="x")
    add_legend(axes, theme)
    return figure


def _bytes(value: float) -> str:
    for size, unit in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if value >= size:
            return f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def _draw_curve(dedup: Facts, theme: Theme) -> "Figure":
    figure, axes = plain_figure(theme, height=4.0)
    counts = {float(start): count for start, count in dedup["candidates"].items()}
    if any(counts.values()):
        behind = axes.twinx()
        behind.bar(list(counts), list(counts.values()), 1 / len(counts), align="edge", color=theme.faint, alpha=0.6)
        behind.set_ylabel("candidates of this run", color=theme.ink, fontsize=9)
        behind.tick_params(colors=theme.ink, labelsize=8)
        behind.spines[:].set_visible(False)
        behind.locator_params(axis="y", integer=True)
        behind.yaxis.set_major_formatter(short_number)
        axes.set_zorder(behind.get_zorder() + 1)
        axes.patch.set_visible(False)
    jaccard_n = np.linspace(0, 1, 201)
    probability_n = 1 - (1 - jaccard_n ** dedup["rows"]) ** dedup["bands"]
    axes.plot(jaccard_n, probability_n, color=theme.strong, linewidth=1.8, label="probability")
    planted = dedup["curve"]
    x_n, y_n = (np.array([point[key] for point in planted]) for key in ("jaccard", "measured"))
    expected_n = np.array([point["expected"] for point in planted])
    error_n = 2 * np.sqrt(expected_n * (1 - expected_n) / dedup["pairs_per_point"])
    axes.errorbar(x_n, y_n, error_n, fmt="o", color=theme.accent, markersize=4, linewidth=1, label="measured")
    if dedup["jaccard"]:
        axes.axvline(dedup["jaccard"], color=theme.ink, linestyle="--", linewidth=1)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("Jaccard index of the sets of shingles")
    axes.set_ylabel("share of pairs that become candidates")
    add_legend(axes, theme, loc="upper left")
    return figure


def _draw_languages(languages: Facts, theme: Theme) -> "Figure":
    ranked = sorted(((found["documents"], name) for name, found in languages.items()), key=lambda x: (-x[0], x[1]))
    shown = ranked[:LANGUAGES]
    if rest := ranked[LANGUAGES:]:
        shown.append((sum(count for count, _ in rest), f"{len(rest)} others"))
    figure, axes = plain_figure(theme, height=0.9 + 0.22 * len(shown))
    axes.barh(range(len(shown)), [count for count, _ in shown], 0.7, color=theme.strong)
    for y, (count, _) in enumerate(shown):
        axes.text(count, y, f" {count:,}", color=theme.ink, fontsize=8, va="center")
    axes.set_yticks(range(len(shown)), [name for _, name in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, max(count for count, _ in shown) * 1.12)
    axes.set_xlabel("documents")
    axes.xaxis.set_major_formatter(short_number)
    axes.grid(False, axis="y")
    return figure
