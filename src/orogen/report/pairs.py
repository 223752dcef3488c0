"""The picture of a run on pairs of answers: their loss, how often the chosen one is preferred, and the rewards."""

import numpy as np

from orogen.report.pictures import Picture
from orogen.report.series import Records, column, running_mean, tokens_seen
from orogen.report.tasks import Panels, add_line, panels_picture

# By panel, its lines: a label, the metric, and whether every step has it (then the line is its running mean).
PANELS = {
    "preference loss": (
        ("training", "preference_loss", True),
        ("held-out", "heldout_preference_loss", False),
    ),
    "accuracy": (("training", "accuracy", True), ("held-out", "heldout_accuracy", False)),
    "reward": (
        ("chosen", "chosen_reward", True),
        ("rejected", "rejected_reward", True),
        ("margin", "margin", True),
        ("margin, held-out", "heldout_margin", False),
    ),
}


def pair_panels(records: Records) -> Panels:
    """The lines of each panel, over the tokens seen; those of every step are running means. Empty for other runs."""
    panels: Panels = {}
    if not np.isfinite(column(records, "preference_loss")).any():
        return panels
    tokens_n = tokens_seen(records)
    for panel, lines in PANELS.items():
        for label, metric, every in lines:
            value_n = column(records, metric)
            add_line(panels, panel, label, tokens_n, running_mean(value_n) if every else value_n)
    return panels


def pair_pictures(records: Records) -> list[Picture]:
    """The picture of a run on pairs; none for other runs."""
    panels = pair_panels(records)
    caption = (
        "Pairs of answers: the loss, the share of pairs whose chosen answer has the higher reward, and the mean "
        "rewards. Lines of training are running means."
    )
    return [panels_picture("pairs", "Pairs of answers", caption, panels)] if panels else []
