"""What is not a request's own never reaches it: other pages, padding, and rows without a request."""

import jax.numpy as jnp
import numpy as np
import pytest
from tests.helpers import several_devices
from tests.infer.engines import LATENT, asked, changed, check_greedy, engine_of, opened, random_prompt

from orogen.config.plan import PlanConfig
from orogen.infer.request import Sampling
from orogen.model.cache import map_layers
from orogen.model.slots import Paged

LENGTH_OF_TEXTS = 32


def plant(engine) -> None:
    """NaN in every place of every page that no running request has, or has but has not come to."""
    page, pages = engine.config.page, engine.sizes.pages
    held, _ = engine._lane.settled()
    own_ns = np.zeros((pages, page), bool)
    place_b = np.asarray(held.state.place_b)  # the host may not have been told of the last tokens
    for slot in engine._slots.values():
        known = place_b[slot.seat] + 1 if slot.generated or slot.ahead else len(slot.request.prompt)
        for number, there in enumerate(slot.pages):
            own_ns[there] |= np.arange(page) + number * page < known

    def poisoned(one):
        if not isinstance(one, Paged):
            return one
        mask = lambda a: own_ns[(..., *(None,) * (a.ndim - 2))]  # noqa: E731
        return one._replace(values=tuple(jnp.where(mask(a), a, jnp.nan) for a in one.values))

    caches = held.caches
    mtp = None if caches.mtp is None else map_layers(poisoned, caches.mtp)
    caches = caches._replace(backbone=map_layers(poisoned, caches.backbone), mtp=mtp)
    engine._lane._held = held._replace(caches=caches)


@pytest.mark.parametrize(
    ("pattern", "changes", "sizes"),
    [("*E", {}, {}), ("+M", LATENT, {}), ("*M/*", {}, {"drafter": "mtp", "drafts": 2, "page": 4})],
)
def test_numbers_that_are_none_in_other_pages_reach_nobody(pattern, changes, sizes):
    """Of three requests in two slots, in each round."""
    model = opened(pattern, **changes)
    engine = engine_of(model, prefix_cache=False, **sizes)
    requests = [asked(random_prompt(n, n), 9) for n in (3, 13, 18)]
    numbers = [engine.submit(request) for request in requests]
    found = {number: [] for number in numbers}
    while engine.busy:
        plant(engine)
        for output in engine.step():
            found[output.number].append(output)
    check_greedy(model, requests, list(found.values()), LENGTH_OF_TEXTS)


@pytest.mark.parametrize(
    ("pattern", "plan"),
    [
        ("M*E", PlanConfig()),
        pytest.param("M*E", PlanConfig(data=2, expert=2, dispatch="alltoall"), marks=several_devices),
    ],
)
def test_padding_reaches_nobody(pattern, plan):
    """Where the embedding of token 0 is NaN, texts without it are what they were."""
    sizes = {"vocab_size": 24, "moe_latent_size": 8, "n_groups": 2}
    sound = opened(pattern, **sizes)
    model = changed(opened(pattern, plan, **sizes), ("embedding", "weight"), lambda a: a.at[0].set(jnp.nan))
    engine = engine_of(model, page=16, chunk=16, slots=4)
    prompts = [tuple(t or 1 for t in random_prompt(n, n, 24)) for n in (1, 5, 16, 21)]
    requests = [asked(prompt, 7, Sampling(temperature=0, logit_bias=((0, -100.0),))) for prompt in prompts]
    check_greedy(sound, requests, engine.run(requests), LENGTH_OF_TEXTS)
