"""The lines of a run on pairs."""

import numpy as np

from orogen.report.pairs import pair_panels, pair_pictures


def test_the_panels_have_what_the_run_recorded():
    records = [
        {"tokens": 10, "preference_loss": 0.5, "accuracy": 0.25, "chosen_reward": 1.0, "margin": 2.0},
        {"tokens": 20, "preference_loss": 0.25, "accuracy": 0.75, "chosen_reward": 3.0, "margin": 4.0,
         "heldout_preference_loss": 0.125, "heldout_accuracy": 1.0},
    ]  # fmt: skip
    panels = pair_panels(records)
    assert {panel: list(lines) for panel, lines in panels.items()} == {
        "preference loss": ["training", "held-out"],
        "accuracy": ["training", "held-out"],
        "reward": ["chosen", "margin"],
    }
    np.testing.assert_array_equal(panels["preference loss"]["training"], [[10, 30], [0.5, 0.25]])
    np.testing.assert_array_equal(panels["accuracy"]["held-out"], [[30], [1]])
    assert [picture.name for picture in pair_pictures(records)] == ["pairs"]
    # Another run's accuracy is not one of pairs.
    assert pair_pictures([{"tokens": 10, "accuracy": 0.5, "loss": 1.0}]) == []
