"""The parts of a report on reinforcement learning: lines by environment, and a table of answers."""

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orogen.report.pictures import Picture
from orogen.report.series import Records, column, running_mean, tokens_seen
from orogen.report.tasks import Panels, add_line, panels_picture

ROLLOUTS = "rollouts"  # the folder of a run's tables of samples
SHOWN = 1500  # characters of a text in the table
# By panel, metrics: a line for the metric itself where it is ALONE, else one per environment, METRIC/ENVIRONMENT.
ALONE = ("mismatch_mean", "mismatch_max", "gap", "zero_gradient_groups", "masked_tokens", "left_out_sequences")
PANELS = {
    "reward": ("reward",),
    "held-out reward": ("heldout_reward",),
    "tokens of an answer": ("answer_tokens",),
    "entropy, nats per token": ("rollout_entropy",),
    "divergence from the teacher, nats per token": ("teacher_divergence",),
    "|log π trainer - log π rollout|": ("mismatch_mean", "mismatch_max", "gap"),
    "shares": ("zero_gradient_groups", "masked_tokens", "left_out_sequences"),
}


def reward_panels(records: Records) -> Panels:
    """The lines of each panel, over the tokens seen; those of training are running means. Empty for other runs."""
    panels: Panels = {}
    tokens_n = tokens_seen(records)
    for panel, metrics in PANELS.items():
        for name, label in _lines(records, metrics):
            value_n = column(records, name)
            value_n = value_n if name.startswith("heldout_") else running_mean(value_n)
            add_line(panels, panel, label, tokens_n, value_n)
    return panels if "reward" in panels and "tokens of an answer" in panels else {}


def _lines(records: Records, metrics: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Name and label of each line. The parts of an environment's reward, METRIC/ENVIRONMENT/PART, have none."""
    names = dict.fromkeys(name for record in records for name in record)
    for metric in metrics:
        for name in names:
            head, _, environment = name.partition("/")
            if head == metric and bool(environment) != (metric in ALONE) and "/" not in environment:
                yield name, environment or metric.replace("_", " ")


def reward_pictures(records: Records) -> list[Picture]:
    """The picture of a run of reinforcement learning; none for other runs."""
    panels = reward_panels(records)
    caption = (
        "Reinforcement learning, by environment. Lines of training are running means. Mismatch: between the trainer's "
        "log-probabilities and the rollout's; gap: of the pass that makes the gradient."
    )
    return [panels_picture("rewards", "Rewards", caption, panels)] if panels else []


def answers_html(run_dir: Path) -> str:
    """The samples that the run wrote of its last batch of rollouts, as a table; "" if there are none."""
    files = sorted((run_dir / ROLLOUTS).glob("*.jsonl"))
    if not files:
        return ""
    rows = [json.loads(line) for line in files[-1].read_text(encoding="utf-8", errors="replace").splitlines()]
    heads = "<th>environment, task</th><th>asked</th><th>said</th>"
    heads += "".join(f'<th class="number">{name}</th>' for name in ("reward", "advantage", "tokens"))
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(map(_row, rows))}</tbody></table>"
    return f"<details open><summary>Answers of rollout {int(files[-1].stem):,}</summary>{table}</details>"


def _row(row: dict[str, Any]) -> str:
    said = _short("\n\n".join(row["said"])) + ("" if row["fault"] is None else f"\n\n[{row['fault']}]")
    cells = f"<td>{html.escape(row['environment'])} {html.escape(str(row['key']))}</td>"
    cells += "".join(f"<td><pre>{html.escape(text)}</pre></td>" for text in (_short(row["prompt"]), said))
    reward = "–" if row["reward"] is None else f"{row['reward']:.3g}"
    numbers = (reward, f"{row['advantage']:+.3g}", f"{row['tokens']:,}")
    cells += "".join(f'<td class="number">{number}</td>' for number in numbers)
    return f"<tr>{cells}</tr>"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} … ({len(text):,} characters)"
