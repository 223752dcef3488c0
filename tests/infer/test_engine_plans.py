"""Engines on several devices answer as on one."""

import pytest
from tests.helpers import several_devices
from tests.infer.engines import asked, check_greedy, engine_of, leaked, opened, random_prompt

from orogen.config.plan import PlanConfig
from orogen.infer.request import Sampling

PLANS = {
    "rows, heads, experts and split parameters": (
        "M*E", {}, PlanConfig(data=2, tensor=2, expert=2, fsdp="parameters", dispatch="allgather")
    ),
    "three ranks and drafts": ("M/M", {"drafter": "mtp", "drafts": 2, "slots": 3}, PlanConfig(tensor=3)),
    "experts over rows, and lookup": (
        "mE", {"drafter": "lookup", "drafts": 2}, PlanConfig(data=2, expert=2, dispatch="alltoall")
    ),
}  # fmt: skip


@several_devices
@pytest.mark.parametrize("name", PLANS)
def test_tokens_are_those_of_one_device(name):
    """Greedy ones, with cached beginnings in either rank; and drawn ones beside them."""
    pattern, drafting, plan = PLANS[name]
    sizes = {"vocab_size": 24, "moe_latent_size": 8, "n_groups": 3 if plan.tensor == 3 else 2}
    one, several = opened(pattern, **sizes), opened(pattern, plan, **sizes)
    engine = engine_of(several, page=16, chunk=16, **({"slots": 4} | drafting))
    requests = [asked(random_prompt(n % 3, 5 + 8 * (n % 3), 24), 9) for n in range(5)]
    drawn = [asked(random_prompt(9, 4, 24), 9, Sampling(temperature=1.0, seed=4)) for _ in range(2)]
    found = engine.run([*requests, *drawn])
    check_greedy(one, requests, found[:5], 32)
    tokens = [[token.id for output in outputs for token in output.tokens] for outputs in found[5:]]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 9
    check_greedy(one, requests[:2], engine.run(requests[:2]), 32)
    assert not any(leaked(engine))
