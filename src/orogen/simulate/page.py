"""A predicted step on one page: numbers, pictures and assumptions in one file that needs no network."""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from orogen.config.cluster import ClusterConfig
from orogen.config.files import write_atomically
from orogen.config.run import RunConfig
from orogen.report.page import document, headline_html, text_html
from orogen.report.profile_page import Grid, table_html
from orogen.report.series import short_number
from orogen.report.svg import svg
from orogen.simulate.hardware import GIB
from orogen.simulate.pictures import Candidate, Drawn, Scaled, pictures
from orogen.simulate.prediction import Prediction
from orogen.simulate.routing import Routing
from orogen.simulate.scaling import scale
from orogen.simulate.search import Ranking, describe


def write_simulation(
    path: Path,
    name: str,
    config: RunConfig,
    cluster: ClusterConfig,
    prediction: Prediction,
    *,
    routing: Routing,
    ranking: Ranking | None = None,
) -> None:
    """Writes the page of a run and of its scaling; with a ranking, the best plan among the others. name: of the run.

    Raises OSError, and ConfigError as `predict` does.
    """
    plans = ranking.plans if ranking else ()
    write_page(
        path,
        title=f"{name} on {prediction.devices:,} x {prediction.hardware}",
        prediction=prediction,
        config_text=config_text(config, cluster),
        scaled=scale(config, cluster, routing=routing),
        candidates=[
            Candidate(
                describe(ranked.plan), ranked.prediction.device_memory_bytes, ranked.prediction.tokens_per_second,
                ranked.prediction is prediction,
            )
            for ranked in plans
        ],
    )  # fmt: skip


def config_text(config: RunConfig, cluster: ClusterConfig) -> str:
    """What was simulated as a gin file: the fields that differ from their defaults."""
    parts = (config.model, config.plan, config.train, config.optimizer, cluster)
    return "\n".join(
        f"{type(part).__name__}.{field.name} = {value!r}"
        for part in parts
        if part is not None
        for field in dataclasses.fields(part)
        if (value := getattr(part, field.name)) != field.default
    )


def write_page(
    path: Path,
    *,
    title: str,
    prediction: Prediction,
    config_text: str,
    scaled: Sequence[Scaled] = (),
    candidates: Sequence[Candidate] = (),
) -> None:
    """Writes the page. config_text: the operative gin text that was simulated. Raises OSError."""
    traffic = traffic_grid(prediction)
    parts = [
        headline_html(headline(prediction)),
        f'<p class="note">{html.escape(_note(prediction))}</p>',
        *(_figure_html(drawn) for drawn in pictures(prediction, scaled, candidates)),
        table_html(traffic) if len(traffic) > 1 else "",
        table_html(flops_grid(prediction.flops)),
        text_html("Configuration", config_text, state=""),
    ]
    page = document(title, parts, style=_STYLE)
    write_atomically(path, page.encode())


def headline(prediction: Prediction) -> dict[str, str]:
    """The numbers that people ask for first, by label."""
    memory, limit = prediction.device_memory_bytes / GIB, prediction.memory_limit_bytes / GIB
    facts = {
        "seconds per step": f"{prediction.step_seconds:,.3f}",
        "tokens per second": short_number(prediction.tokens_per_second),
        "tokens per second and device": f"{prediction.tokens_per_second_per_device:,.0f}",
        "model FLOPs utilisation": f"{prediction.mfu:.1%}",
        "TFLOP/s per device": f"{prediction.tflops_per_device:,.0f}",
        "GiB of the fullest device": f"{memory:,.1f} of {limit:,.0f}" + ("" if prediction.fits else ": does not fit"),
        "bubble": f"{prediction.bubble:.1%}",
        f"devices: {prediction.hardware}": f"{prediction.devices:,}",
    }
    if prediction.goodput < 1:
        facts["goodput: time that makes progress"] = f"{prediction.goodput:.1%}"
    return facts | {
        f"{name.replace('_', ' ').replace('kwh', 'kWh')}, all steps": _short(value)
        for name, value in prediction.budget.items()
    }


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _note(prediction: Prediction) -> str:
    text = f"Predicted from the config, not measured. Limited by: {prediction.limit}."
    text += f" {prediction.left_out}" if prediction.left_out else ""
    if any(line.unit == "E" for line in prediction.rooflines):
        share = f"the busiest expert rank has {prediction.imbalance:.2f} times its even share"
        text += f" Routing is assumed to be {prediction.routing}: {share}."
    return text


def traffic_grid(prediction: Prediction) -> Grid:
    """What one device sends in a step, with heads; the longest first."""
    heads = ("axes", "operation", "link", "GB", "ms", "ms exposed")
    longest_first = sorted(prediction.communication, key=lambda traffic: -traffic.seconds)
    grid = [
        (
            " + ".join(traffic.axes), traffic.operation, traffic.link, f"{traffic.bytes / 1e9:,.3f}",
            f"{1e3 * traffic.seconds:,.2f}", f"{1e3 * traffic.exposed_seconds:,.2f}",
        )
        for traffic in longest_first
    ]  # fmt: skip
    return [heads, *grid]


def flops_grid(flops: Mapping[str, float]) -> Grid:
    """FLOPs of a step by convention, with heads."""
    grid = [(name, f"{count / 1e15:,.3f}") for name, count in flops.items()]
    return [("FLOPs of a step, by convention", "PFLOP"), *grid]


def _figure_html(drawn: Drawn) -> str:
    picture = svg(drawn.figure, name=drawn.name, tips=drawn.tips)
    heading, caption = html.escape(drawn.heading), html.escape(drawn.caption)
    return f"<section><h2>{heading}</h2><figure>{picture}<figcaption>{caption}</figcaption></figure></section>"


_STYLE = """
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
.tip:hover { opacity: .55; }
.note { color: var(--quiet); margin: 0 0 1.25rem; max-width: 52rem; }
"""
