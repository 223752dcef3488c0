"""Engines that read prompts over several ranks of `context` answer as on one device."""

import numpy as np
import pytest
from tests.helpers import several_devices
from tests.infer.engines import (
    LATENT,
    asked,
    check_greedy,
    chosen,
    engine_of,
    ids,
    leaked,
    logits_of,
    opened,
    random_prompt,
)
from tests.infer.test_prompt_scores import check_scores

from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig
from orogen.infer.request import Sampling

PLANS = {
    "heads, experts and windows": (
        "M*wE", {"sliding_window": 6, "n_routed_experts": 8},
        PlanConfig(context=2, tensor=2, expert=4, dispatch="alltoall", context_attention="allgather"),
    ),
    "rows, latent vectors and drafts": (
        "m+/M+", {"drafter": "mtp", "drafts": 2, **LATENT}, PlanConfig(data=2, context=2, context_attention="allgather")
    ),
    "pages alone": ("*E", {}, PlanConfig(context=2, context_attention="allgather")),
}  # fmt: skip
ENGINE = ("drafter", "drafts")
LENGTH = 48


@several_devices
@pytest.mark.parametrize("name", PLANS)
def test_tokens_are_those_of_one_device(name):
    """Of prompts that fill no part, less than one, and several pieces, together, after cached beginnings, and after
    answers; drawn ones beside them."""
    pattern, changes, plan = PLANS[name]
    sizes = {"vocab_size": 24, "moe_latent_size": 8, "n_groups": 2}
    sizes |= {key: value for key, value in changes.items() if key not in ENGINE}
    one, several = opened(pattern, **sizes), opened(pattern, plan, **sizes)
    drafting = {key: value for key, value in changes.items() if key in ENGINE}
    engine = engine_of(several, slots=4, max_length=LENGTH, **drafting)
    requests = [asked(random_prompt(n, length, 24), 7) for n, length in enumerate((1, 9, 37, 16, 23, 2))]
    drawn = [asked(random_prompt(9, 4, 24), 9, Sampling(temperature=1.0, seed=4)) for _ in range(2)]
    found = engine.run([*requests, *drawn])
    check_greedy(one, requests, found[:6], LENGTH)
    assert ids(found[6]) == ids(found[7]) and len(ids(found[6])) == 9
    again = [asked((*requests[n].prompt[:length], 3, 5), 7) for n, length in ((2, 33), (4, 17), (2, 36))]
    again.append(asked((*requests[4].prompt, *ids(found[4]), 3), 7))
    before = engine.stats.cached_tokens
    check_greedy(one, again, engine.run(again), LENGTH)
    assert engine.stats.cached_tokens > before
    scored = [asked(requests[2].prompt, 3, prompt_logprobs=2), asked(requests[1].prompt, 0, prompt_logprobs=0)]
    found = engine.run(scored)
    assert len(chosen(found[0])) == 3
    check_scores(one, scored, found, logits_of(one, [request.prompt for request in scored], LENGTH))
    assert not any(leaked(engine))


@several_devices
def test_caches_in_fewer_bits_are_those_of_one_device():
    """FP8 keys and values and int8 states to the nearest, of prompts in one piece: those that one device keeps."""
    stored = {"key_values": "fp8_unscaled", "state_dtype": "int8", "state_rounding": "nearest"}
    requests = [asked(random_prompt(n, length, 24), 7) for n, length in enumerate((13, 2, 16, 9))]
    found = []
    for plan in (None, PlanConfig(context=2, context_attention="allgather")):
        model = opened("M*w", plan, sliding_window=6, vocab_size=24, n_groups=2)
        found.append(engine_of(model, slots=4, **stored).run(requests))
    for one, other in zip(*found, strict=True):
        assert ids(one) == ids(other)
        logprobs = [[token.logprob for token in chosen(outputs)] for outputs in (one, other)]
        np.testing.assert_allclose(*logprobs, atol=1e-4)


@several_devices
@pytest.mark.parametrize(("pattern", "plan"), [("M", {"context_attention": "ring"}), ("*", {"context_ssm": "heads"})])
def test_layers_that_a_model_lacks_are_not_asked_about(pattern, plan):
    plan = PlanConfig(context=2, **({"context_attention": "allgather"} | plan))
    one, several = (opened(pattern, laid, vocab_size=24, n_groups=2) for laid in (None, plan))
    requests = [asked(random_prompt(1, 9, 24), 3)]
    check_greedy(one, requests, engine_of(several, slots=4).run(requests), LENGTH)


@several_devices
@pytest.mark.parametrize(
    ("plan", "slots", "message"),
    [
        ({"context_attention": "ring"}, 4, "PlanConfig.context_attention is 'ring'; expected allgather"),
        ({"context_ssm": "heads"}, 4, "PlanConfig.context_ssm is 'heads'; expected state"),
        ({"tensor": 2}, 6, "EngineConfig.slots is 6; expected a multiple of data x context x tensor = 4"),
    ],
)
def test_refusals(plan, slots, message):
    plan = PlanConfig(context=2, **({"context_attention": "allgather"} | plan))
    with pytest.raises(ConfigError, match=message):
        engine_of(opened("M*", plan, n_groups=2), slots=slots)
