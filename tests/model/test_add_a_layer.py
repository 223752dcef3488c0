"""A letter added as the docstring of `orogen.model` says trains under two plans, and every table knows each letter."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from tests.helpers import hybrid, run_config, several_devices
from tests.model.small import randomised

from orogen.config import remat
from orogen.config.model import LAYERS, ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.products import PRODUCTS
from orogen.config.readers import LETTERS
from orogen.config.remat import NAMES, Intermediate
from orogen.config.rounded import LETTER_KINDS
from orogen.cost.collectives import LAYER_COLLECTIVES, block
from orogen.cost.communication import step_collectives
from orogen.cost.flops import LAYER_FLOPS, forward_flops_per_token
from orogen.cost.kept import LAYER_KEPT, LAYER_PRODUCTS, kept_bytes, local
from orogen.cost.ledger import Workload
from orogen.cost.weights import LAYER_WEIGHTS, Weight, weights
from orogen.layers.documents import Documents, documents
from orogen.layers.linear import linear
from orogen.layers.parameter import normal
from orogen.model.block import MIXERS, Stack, repeats
from orogen.model.cache import Rows, caches
from orogen.model.count import count
from orogen.model.lm import build
from orogen.parallel.plan import Plan, make_plan
from orogen.simulate.fit import count as counted
from orogen.simulate.operations import LAYER_OPERATIONS, product
from orogen.simulate.predict import predict
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.optimizer import make_optimizer
from orogen.train.sides import packed_batch
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices, make_step

TABLES: dict[str, dict[str, Any]] = {
    "MIXERS": MIXERS,
    "LAYER_FLOPS": LAYER_FLOPS,
    "LAYER_COLLECTIVES": LAYER_COLLECTIVES,
    "LAYER_WEIGHTS": LAYER_WEIGHTS,
    "LAYER_KEPT": LAYER_KEPT,
    "LAYER_PRODUCTS": LAYER_PRODUCTS,
    "LAYER_OPERATIONS": LAYER_OPERATIONS,
    "LETTER_KINDS": LETTER_KINDS,
    "PRODUCTS": PRODUCTS,
}  # fmt: skip
WIDTH = 32


class Toy(nnx.Module):
    """down(tanh(up x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.up = normal(rngs, (config.hidden_size, WIDTH), ("embed", "mlp"), std=config.init_std)
        self.down = normal(rngs, (WIDTH, config.hidden_size), ("mlp", "embed"), std=config.output_init_std)

    def __call__(self, x_btd: Array, docs: Documents, plan: Plan, given: None = None) -> tuple[Array, None]:
        u_btf = checkpoint_name(linear(plan.enter(x_btd), self.up, plan), "toy")
        return plan.leave(linear(jnp.tanh(u_btf), self.down, plan)), None

    def start(self, room: Any, dtype: Any) -> None:
        return None

    def cache_axes(self, room: Any) -> None:
        return None


@pytest.fixture
def toy(monkeypatch):
    """The letter t, in every table."""
    entries = {
        "MIXERS": Toy,
        "LAYER_FLOPS": lambda model, _: 4 * model.hidden_size * WIDTH,
        "LAYER_COLLECTIVES": block,
        "LAYER_WEIGHTS": lambda model: [
            Weight((WIDTH, model.hidden_size), ("mlp", "embed")),
            Weight((model.hidden_size, WIDTH), ("embed", "mlp")),
        ],
        "LAYER_KEPT": lambda here: {"toy": here.tokens * here.split(WIDTH) * here.itemsize},
        "LAYER_PRODUCTS": ("toy",),
        "LETTER_KINDS": (),
        "PRODUCTS": {},
        "LAYER_OPERATIONS": lambda here: [
            product("up", here.tokens, here.model.hidden_size, here.split(WIDTH), here.itemsize, makes="toy"),
            product("down", here.tokens, here.split(WIDTH), here.model.hidden_size, here.itemsize, last=True),
        ],
    }
    monkeypatch.setitem(LAYERS, "t", "toy")
    monkeypatch.setattr(remat, "EVERY", "".join(LAYERS))  # as it would be, were the letter there at import
    monkeypatch.setitem(NAMES, "toy", Intermediate("t", "the hidden units"))
    for name, row in entries.items():
        monkeypatch.setitem(TABLES[name], "t", row)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_each_letter_and_no_other(name):
    assert set(TABLES[name]) == set(LAYERS)
    with pytest.raises(KeyError):
        TABLES[name]["t"]


def test_fields_and_intermediates_are_of_known_letters():
    assert set().union(*LETTERS.values()) == set(LAYERS)
    assert set().union(*(letters for letters, _ in NAMES.values())) == set(LAYERS)


@several_devices
def test_a_new_letter_trains_under_two_plans(toy):
    model = hybrid(pattern="t-t-t", mtp_depths=0)
    losses = []
    for sizes in ({}, {"tensor": 2, "data": 2, "fsdp": "parameters", "remat": "t:toy"}):
        config = run_config(model, plan=sizes, batch_size=4, sequence_length=16)
        plan, built = make_plan(config.plan, model), build(model)
        optimizer = make_optimizer(config.optimizer, config.train.steps, built.params)
        step, state = (
            make_step(built, NEXT_TOKENS, config, plan, optimizer),
            create_state(model, built, optimizer, plan, 0),
        )
        batch, found = batch_to_devices(packed_batch(config, config.train), plan), []
        for _ in range(3):
            state, metrics = step(state, batch)
            found.append(float(metrics.loss))
        losses.append(found)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0][2] < losses[0][0] - 0.5


def test_a_new_letter_is_counted(toy):
    one, two = hybrid(pattern="tM", mtp_depths=0), hybrid(pattern="ttM", mtp_depths=0)
    size = one.hidden_size
    for total in (lambda model: count(model)["total"], counted):
        assert total(two) - total(one) == 2 * size * WIDTH + size  # with its norm
    norm, down, up = (size,), (WIDTH, size), (size, WIDTH)
    assert weights(one).layers["t"] == (
        Weight(down, ("mlp", "embed")), Weight(up, ("embed", "mlp")), Weight(norm, ("norm",), float32=True),
    )  # fmt: skip
    assert forward_flops_per_token(two, 16) - forward_flops_per_token(one, 16) == 4 * size * WIDTH
    config = run_config(two, plan={"tensor": 2})
    units = step_collectives(two, config.plan, Workload(rows=4, tokens=16, itemsize=4))
    assert {record.operation for record in units["t"] if record.bytes} >= {"all-gather", "reduce-scatter"}
    assert predict(config).step_seconds > predict(run_config(one, plan={"tensor": 2})).step_seconds
    sizes = PlanConfig(remat="elementwise")
    assert kept_bytes("t", local(two, sizes, Workload(rows=4, tokens=16, itemsize=4)))[0]["toy"] == 64 * WIDTH * 4


def test_a_new_letter_starts_beside_layers_with_memory(toy):
    model = hybrid(pattern="tM", mtp_depths=0)
    plan = make_plan(PlanConfig(), model)
    graph, abstract = nnx.split(jax.eval_shape(lambda: Stack(repeats("tM"), model, nnx.Rngs(0))))
    state, room = randomised(abstract, np.random.default_rng(0)), Rows(2, 6)
    x_btd = np.random.default_rng(1).normal(size=(2, 6, model.hidden_size)).astype(np.float32)

    @jax.jit
    def run(state, x_btd):
        stack, docs = nnx.merge(graph, state), documents(jnp.ones((2, 6), jnp.int32))
        given, pieces = stack.start(room, jnp.float32), []
        assert given[0] is None and len(stack.cache_axes(room)) == 2
        for part in (slice(0, 2), slice(2, 6)):
            piece = jax.tree.map(lambda a, part=part: a[:, part], (x_btd, docs))
            y_btd, kept = stack(*piece, plan, given)
            given, pieces = caches(kept), [*pieces, y_btd]
        return stack(x_btd, docs, plan)[0], jnp.concatenate(pieces, 1)

    whole_btd, pieces_btd = run(state, x_btd)
    np.testing.assert_allclose(pieces_btd, whole_btd, rtol=1e-5, atol=1e-6)
