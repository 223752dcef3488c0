"""Log-likelihoods of rows: against numpy on the whole model's logits, on one device and on plans."""

import numpy as np
import pytest
from tests.helpers import several_devices
from tests.infer.engines import logits_of, opened

from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig
from orogen.evaluate.likelihood import Row, Scorer

LENGTHS = (1, 2, 31, 32, 33, 17, 64, 5)
PLANS = {
    "tensor and experts": {"tensor": 2, "data": 2, "expert": 2},
    "context": {"context": 2, "fsdp": "optimizer"},
    "stages": {"stage": 2, "microbatches": 2},
}


def rows(size: int) -> list[Row]:
    """Rows at and around the edges of the padded lengths; a third of the tokens are asked for."""
    rng = np.random.default_rng(7)
    made = []
    for length in LENGTHS:
        asked_t = rng.random(length) < 0.3
        asked_t[0] = False
        made.append(Row(rng.integers(0, size, length).astype(np.int32), asked_t))
    return made


def expected(model, made: list[Row]) -> list[tuple[float, int, int]]:
    """In float64 from the logits of each row alone."""
    found = []
    for row in made:
        logits_tv = logits_of(model, [row.tokens_t.tolist()], max(LENGTHS))[0].astype(np.float64)
        logits_tv -= logits_tv.max(-1, keepdims=True)
        likelihood_tv = logits_tv - np.log(np.exp(logits_tv).sum(-1, keepdims=True))
        indices = np.flatnonzero(row.asked_t)
        total = sum(likelihood_tv[place - 1, row.tokens_t[place]] for place in indices)
        hits = sum(int(likelihood_tv[place - 1].argmax() == row.tokens_t[place]) for place in indices)
        found.append((float(total), hits, len(indices)))
    return found


def check(scores, wanted) -> None:
    for score, (total, hits, asked) in zip(scores, wanted, strict=True):
        assert (score.hits, score.asked) == (hits, asked)
        assert score.log_likelihood == pytest.approx(total, abs=1e-4)


def test_rows_are_scored_alone_whatever_their_length_and_order():
    model = opened("M*-E")
    made = rows(model.config.vocab_size)
    # The likeliest token of the second row, so that something is a hit.
    best = logits_of(model, [made[1].tokens_t.tolist()], max(LENGTHS))[0, 0].argmax()
    made[1] = Row(np.array([made[1].tokens_t[0], best], np.int32), np.array([False, True]))
    scorer, weights = Scorer(model, batch_tokens=64), (model.params, model.buffers)
    wanted = expected(model, made)
    assert wanted[1][1] == 1 and sum(asked for *_, asked in wanted) > 30
    check(scorer.score(made, weights), wanted)
    programs = set(scorer.programs)
    assert programs == {(2, 32), (1, 64)}
    check(scorer.score(made[::-1], weights), wanted[::-1])
    check(scorer.score(made[:3], weights), wanted[:3])
    assert scorer.programs == programs
    assert scorer.score([], weights) == []


@several_devices
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_plan_scores_as_one_device(plan):
    pattern = "*|-" if "stage" in plan else "*E" if "expert" in plan else "M*"
    alone = opened(pattern.replace("|", ""))
    made = rows(alone.config.vocab_size)
    folded = opened(pattern, PlanConfig(**plan))
    check(Scorer(folded, batch_tokens=128).score(made, (folded.params, folded.buffers)), expected(alone, made))


def test_what_cannot_be_scored_is_refused():
    model = opened("-")
    bad = [
        (Row(np.array([1, 2], np.int32), np.array([True, True])), "a text asks for its first token"),
        (Row(np.array([], np.int32), np.array([], bool)), "a text asks for its first token"),
        (Row(np.array([1, 23], np.int32), np.array([False, True])), "tokens are from 1 to 23; expected 0 to 22"),
    ]
    for row, message in bad:
        with pytest.raises(ConfigError, match=message):
            Scorer(model).score([row], (model.params, model.buffers))
    with pytest.raises(ConfigError, match="drops tokens"):
        Scorer(opened("E", PlanConfig(capacity_factor=1.0)))


def test_one_token_more_than_the_learned_positions_is_scored():
    """The last token is only predicted, so it needs no position."""
    model = opened("*-", learned_positions=7)
    tokens_t = np.random.default_rng(3).integers(0, model.config.vocab_size, 8).astype(np.int32)
    logits_tv = logits_of(model, [tokens_t[:7].tolist()], 7)[0].astype(np.float64)
    logits_tv -= np.log(np.exp(logits_tv).sum(-1, keepdims=True))
    asked_t, weights = np.arange(8) > 0, (model.params, model.buffers)
    (score,) = Scorer(model).score([Row(tokens_t, asked_t)], weights)
    assert score.asked == 7
    assert score.log_likelihood == pytest.approx(logits_tv[np.arange(7), tokens_t[1:]].sum(), abs=1e-4)
    expected = "a text of 9 tokens; expected at most 8, one more than ModelConfig.learned_positions"
    with pytest.raises(ConfigError, match=expected):
        Scorer(model).score([Row(np.zeros(9, np.int32), np.arange(9) > 0)], weights)
