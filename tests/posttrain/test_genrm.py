"""Judges of two answers: what they are shown, what they say, and the rewards."""

import pytest

from orogen.config.checks import ConfigError
from orogen.posttrain.genrm import (
    Judgement,
    Match,
    circular_pairs,
    judge_messages,
    judge_reward,
    read_judgement,
    rewards_of,
    swapped,
)

ASKED = {"role": "user", "content": "capital of France?"}
SAID = '{"score_1": 4, "score_2": 2.5, "ranking": 2}'


def test_a_judge_is_shown_the_conversation_and_both_answers():
    shown = judge_messages([ASKED], ("Paris", "  "), principle="be short")
    assert shown == [
        ASKED,
        {"role": "principle", "content": "be short"},
        {"role": "response_1", "content": "Paris"},
        {"role": "response_2", "content": "None"},
    ]
    assert len(judge_messages([ASKED], ("a", "b"))) == 3
    with pytest.raises(ConfigError, match="ends with 'assistant'; expected a message of the user"):
        judge_messages([ASKED, {"role": "assistant", "content": "Paris"}], ("a", "b"))
    with pytest.raises(ConfigError, match="ends with None"):
        judge_messages([], ("a", "b"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (SAID, (4, 2.5, 2)),
        (f"First I thought {{}} and {{this}}.\n```json\n{SAID}\n```\n", (4, 2.5, 2)),
        ('{"score_1": 1, "score_2": 1, "ranking": 1} no: ' + SAID, (4, 2.5, 2)),  # the last one counts
        ('{"overall": ' + SAID + "}", (4, 2.5, 2)),
        (f"<think>{SAID}</think>", None),
        ('{"score_1": 4, "ranking": 2}', None),
        ('{"score_1": 6, "score_2": 2, "ranking": 2}', None),
        ('{"score_1": 5, "score_2": 1, "ranking": 0}', None),
        ('{"score_1": true, "score_2": 2, "ranking": 2}', None),
        ('{"score_1": NaN, "score_2": 2, "ranking": 2}', None),
        ('{"score_1": 4, "score_2": 2', None),
        ("{" * 5000, None),
        ("", None),
    ],
)
def test_a_judgement_is_read_from_what_a_judge_writes(text, found):
    assert read_judgement(text) == found


def test_the_reward_of_a_judge_by_hand():
    truth = Judgement(5, 1, 1)
    # -|4 - 5| - |2.5 - 1| - |2 - 1|, with twice the last.
    assert judge_reward(SAID, truth) == -3.5 and judge_reward(SAID, truth, ranking_weight=2.0) == -4.5
    assert judge_reward("no idea", truth) == -10 and judge_reward("", truth, format_penalty=4.0) == -4
    assert judge_reward('{"score_1": 5, "score_2": 1, "ranking": 1}', truth) == 0
    assert swapped(truth) == (1, 5, 6) and swapped(swapped(truth)) == truth


def test_rewards_of_answers_by_hand():
    assert circular_pairs(3) == [(0, 1), (1, 2), (2, 0)] and circular_pairs(2) == [(0, 1), (1, 0)]
    with pytest.raises(ValueError, match="1 answers; expected at least 2"):
        circular_pairs(1)
    matches = [
        Match(0, 1, Judgement(4, 2, 2)),
        Match(1, 2, Judgement(3, 3, 1)),  # a tie: 3 + 2.5 and 3 - 2.5
        Match(2, 0, Judgement(2, 2, 3.5)),  # a tie that the ranking leaves
    ]
    assert rewards_of(matches, 3) == [(4 + 2) / 2, (2 + 5.5) / 2, (0.5 + 2) / 2]
    with pytest.raises(ValueError, match="answer 3 has no match"):
        rewards_of(matches, 4)
