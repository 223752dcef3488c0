"""Routing that is balanced by construction: choices that a step replays instead of those of its routers."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from orogen.config.checks import require
from orogen.config.run import RunConfig
from orogen.model.block import Repeat, repeats
from orogen.model.by_letter import Items
from orogen.model.lm import Built
from orogen.model.stages import MOE
from orogen.moe.layer import Replay
from orogen.parallel.plan import Plan
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.step import replay_of


def balanced_choices(built: Built, plan: Plan, config: RunConfig) -> Any:
    """The `replay` of a step in which token t of a row has expert (t·k + j) mod E as its j-th of k.

    A run of E / gcd(E, k) neighbouring tokens chooses every expert equally often, so that all experts and all source
    ranks have the same load wherever a rank's part of a row is a multiple of it. Nothing is dropped beforehand.
    Raises ConfigError if a rank's part is not.
    """
    model, train, parts = config.model, config.train, plan.config.microbatches
    time, k, experts = train.sequence_length, model.num_experts_per_tok, model.n_routed_experts
    part = time // (plan.config.context * plan.config.tensor)
    expected = f"one of which each rank has a multiple of {experts // np.gcd(experts, k)} tokens"
    require(part * k % experts == 0, train, "sequence_length", expected)
    chosen_tk = (np.arange(time * k, dtype=np.int32) % experts).reshape(time, k)

    def stack(items: Items, lead: tuple[int, ...]) -> Any:
        shape = (*lead, train.batch_size // parts, time, k)
        arrays: Any = np.broadcast_to(chosen_tk, shape), np.broadcast_to(np.True_, shape)
        each = Replay(*arrays)
        of = lambda item: each if item == MOE else None  # noqa: E731
        return tuple(stack(i.items, (*lead, i.count)) if isinstance(i, Repeat) else of(i) for i in items)

    depths = NEXT_TOKENS.depths(model)
    layers = (repeats(model.layers.main), *[repeats(model.layers.mtp)] * depths)
    replay = built.layout.split_replay(tuple(stack(items, (parts,)) for items in layers))
    specs = replay_of(built.layout.choice_specs(plan, depths))
    return jax.device_put(replay, jax.tree.map(lambda spec: NamedSharding(plan.mesh, spec), specs))
