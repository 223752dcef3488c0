"""The lines and the table of a run of reinforcement learning."""

import json

import numpy as np

from orogen.report.rewards import answers_html, reward_panels, reward_pictures

RECORDS = [
    {"tokens": 10, "reward": 0.5, "reward/bits": 0.25, "reward/bits/exact": 0.2, "answer_tokens/bits": 2.0, "gap": 0.1,
     "mismatch_mean": 0.5, "heldout_reward/bits": 0.0, "rollout_entropy/bits": 1.0, "answer_tokens": 2.0},
    {"tokens": 20, "reward/bits": 0.75, "reward/desk": 1.0, "answer_tokens/bits": 4.0, "heldout_reward/bits": 1.0},
]  # fmt: skip


def test_every_environment_has_a_line():
    panels = reward_panels(RECORDS)
    assert {panel: list(lines) for panel, lines in panels.items()} == {
        "reward": ["bits", "desk"],
        "held-out reward": ["bits"],
        "tokens of an answer": ["bits"],
        "entropy, nats per token": ["bits"],
        "|log π trainer - log π rollout|": ["mismatch mean", "gap"],
    }
    np.testing.assert_array_equal(panels["reward"]["bits"], [[10, 30], [0.25, 0.75]])
    np.testing.assert_array_equal(panels["held-out reward"]["bits"], [[10, 30], [0, 1]])
    assert [picture.name for picture in reward_pictures(RECORDS)] == ["rewards"]
    assert reward_pictures([{"tokens": 10, "chosen_reward": 0.5, "gap": 1.0}]) == []


def test_the_last_answers_are_shown_as_text(tmp_path):
    """What a model wrote is no part of the page; texts are cut; a sample without a verdict has no reward."""
    assert answers_html(tmp_path) == ""
    folder = tmp_path / "rollouts"
    folder.mkdir()
    row = {"environment": "bits", "key": "7", "prompt": "xor 10=", "said": ["<script>", "x" * 2000], "rewards": {},
           "reward": None, "fault": "crash: gone", "advantage": -0.5, "tokens": 1234}  # fmt: skip
    (folder / "00000000.jsonl").write_text("{}\n")
    (folder / "00000012.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"reward": 1.0}) + "\n")
    page = answers_html(tmp_path)
    assert "<script>" not in page and "&lt;script&gt;" in page and "rollout 12" in page
    assert page.count("bits 7") == 2 and "–" in page and "-0.5" in page and "1,234" in page
    assert "(2,010 characters)" in page and "x" * 1600 not in page
