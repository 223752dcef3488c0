"""A letter added as the docstring of `orogen.model` says, by one row, trains under two plans and is counted."""

import dataclasses
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
from tests.test_style import ORDER, place

from orogen.compress.slices import units_of
from orogen.config.checks import ConfigError
from orogen.config.kinds import LAYERS, Kind, either, kind_of, reading, resolved
from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.config.precision import KINDS as WEIGHT_KINDS
from orogen.config.products import product_of
from orogen.config.remat import names_of
from orogen.config.rounded import weight_kinds
from orogen.cost.collectives import block
from orogen.cost.communication import step_collectives, unit_collectives
from orogen.cost.flops import forward_flops_per_token, layer_flops_per_token
from orogen.cost.kept import kept_bytes, named_bytes
from orogen.cost.kind import LayerCosts, costs_of
from orogen.cost.ledger import Workload
from orogen.cost.local import local
from orogen.cost.operation import product
from orogen.cost.weight import Weight
from orogen.cost.weights import changed, weights
from orogen.layers.documents import Documents, documents
from orogen.layers.linear import linear
from orogen.layers.parameter import normal
from orogen.model.block import Layer, Stack, repeats
from orogen.model.cache import Rows, caches
from orogen.model.count import count
from orogen.model.lm import build
from orogen.parallel.legal import fold_plan
from orogen.parallel.plan import Plan, make_plan
from orogen.simulate.fit import count as counted
from orogen.simulate.operations import layer_operations
from orogen.simulate.predict import predict
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.optimizer import make_optimizer
from orogen.train.sides import packed_batch
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices, make_step

WIDTH = 32
HERE_WORK = Workload(rows=4, tokens=16)
HERE = local(hybrid(), PlanConfig(), HERE_WORK)


class Toy(nnx.Module):
    """down(tanh(up x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.up = normal(rngs, (config.hidden_size, WIDTH), ("embed", "mlp"), std=config.init_std)
        self.down = normal(rngs, (WIDTH, config.hidden_size), ("mlp", "embed"), std=config.output_init_std)

    def __call__(self, x_btd: Array, docs: Documents, plan: Plan, given: None = None) -> tuple[Array, None]:
        u_btf = checkpoint_name(linear(plan.enter(x_btd), self.up, plan), "toy")
        return plan.leave(linear(jnp.tanh(u_btf), self.down, plan)), None

    def start(self, allocator: Any, dtype: Any) -> None:
        return None

    def cache_axes(self, allocator: Any) -> None:
        return None


COSTS = LayerCosts(
    flops=lambda model, _: 4 * model.hidden_size * WIDTH,
    weights=lambda model: [
        Weight((model.hidden_size, WIDTH), ("embed", "mlp")),
        Weight((WIDTH, model.hidden_size), ("mlp", "embed")),
    ],
    kept=lambda here: {"toy": here.tokens * here.split(WIDTH) * here.itemsize},
    products=("toy",),
    collectives=block,
    operations=lambda here: [
        product("up", here.tokens, here.model.hidden_size, here.split(WIDTH), here.itemsize, makes="toy"),
        product("down", here.tokens, here.split(WIDTH), here.model.hidden_size, here.itemsize, last=True),
    ],
)
ROW = Kind(
    name="toy",
    mixer="tests.model.test_add_a_layer:Toy",
    costs="tests.model.test_add_a_layer:COSTS",
    reads="learned_scale",
    names={"toy": "the hidden units"},
)


@pytest.fixture
def toy(monkeypatch):
    """The letter t: all that is added is its row."""
    monkeypatch.setitem(LAYERS, "t", ROW)


@pytest.mark.parametrize("letter", LAYERS)
def test_every_row_names_what_the_packages_above_have(letter):
    kind = LAYERS[letter]
    assert isinstance(costs_of(letter), LayerCosts) and callable(resolved(kind.mixer))
    assert kind.selective <= kind.names.keys() and {*costs_of(letter).unread} <= kind.names.keys()
    assert {*kind.split.split()} <= kind.fields and kind.taps in {"", *kind.fields}
    assert set(costs_of(letter).kernels) <= set(FOR_GPU)
    assert set(costs_of(letter).products) <= {*kind.names, "chosen"}
    model, plan = ({field.name for field in dataclasses.fields(config)} for config in (ModelConfig, PlanConfig))
    assert model >= {*kind.needs.split(), *kind.reads.split()} and plan >= {*kind.plan.split()} and not model & plan
    assert set(kind.weights) <= {*WEIGHT_KINDS} and {name for name, _ in kind.products.values()} <= {*WEIGHT_KINDS}
    assert not kind.units or units_of(letter)


def test_a_reference_is_not_above_the_package_that_resolves_it():
    for kind in LAYERS.values():
        for reference, package in ((kind.mixer, "model"), (kind.costs, "cost"), (kind.units, "compress")):
            assert not reference or ORDER.index(place(reference.removeprefix("orogen."))) <= ORDER.index(package)


@pytest.mark.parametrize(
    "of_letter",
    [
        kind_of, costs_of, units_of, names_of, lambda letter: PlanConfig(remat="paper").layer_remat(letter),
        lambda letter: product_of(letter, ("mixer", "up")), lambda letter: weight_kinds(letter, hybrid()),
        lambda letter: Layer(letter, hybrid(), nnx.Rngs(0)), lambda letter: layer_operations(letter, HERE),
        lambda letter: named_bytes(letter, HERE), lambda letter: layer_flops_per_token(letter, hybrid(), 8),
        lambda letter: unit_collectives(letter, hybrid(), PlanConfig(), HERE_WORK),
        lambda letter: weights(changed(hybrid(), pattern=letter)),
    ],
)  # fmt: skip
def test_a_letter_without_a_row_is_refused_wherever_it_is_looked_up(of_letter):
    with pytest.raises(ConfigError, match=r"'q' is no kind of layer|unknown letter 'q'"):
        of_letter("q")


def test_what_only_some_layers_read_is_read_by_the_new_ones(toy):
    assert reading("learned_scale") == "t" and either("tM") == "toy (t) or Mamba-2 (M)"


def test_widths_and_taps_of_a_new_letter_are_checked(monkeypatch):
    row = ROW._replace(needs="time_step_rank", split="time_step_rank", reads="chunk_size", taps="chunk_size")
    monkeypatch.setitem(LAYERS, "t", row)
    model = hybrid(pattern="t-", mtp_depths=0, time_step_rank=6, chunk_size=9)
    with pytest.raises(
        ConfigError, match=r"ModelConfig.time_step_rank is 6; expected a multiple of PlanConfig.tensor = 4"
    ):
        fold_plan(PlanConfig(tensor=4), model)
    fold_plan(PlanConfig(tensor=2), model)
    mamba1 = dataclasses.replace(model, pattern="m-", mamba_intermediate_size=8)  # whose layers read it whole
    fold_plan(PlanConfig(tensor=4), mamba1)
    assert (model.taps, model.reach) == (9, 8)
    assert (dataclasses.replace(model, pattern="-").taps, dataclasses.replace(model, pattern="M-").taps) == (1, 4)


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
        Weight(up, ("embed", "mlp")), Weight(down, ("mlp", "embed")), Weight(norm, ("norm",), float32=True),
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
    state, allocator = randomised(abstract, np.random.default_rng(0)), Rows(2, 6)
    x_btd = np.random.default_rng(1).normal(size=(2, 6, model.hidden_size)).astype(np.float32)

    @jax.jit
    def run(state, x_btd):
        stack, docs = nnx.merge(graph, state), documents(jnp.ones((2, 6), jnp.int32))
        given, pieces = stack.start(allocator, jnp.float32), []
        assert given[0] is None and len(stack.cache_axes(allocator)) == 2
        for part in (slice(0, 2), slice(2, 6)):
            piece = jax.tree.map(lambda a, part=part: a[:, part], (x_btd, docs))
            y_btd, kept = stack(*piece, plan, given)
            given, pieces = caches(kept), [*pieces, y_btd]
        return stack(x_btd, docs, plan)[0], jnp.concatenate(pieces, 1)

    whole_btd, pieces_btd = run(state, x_btd)
    np.testing.assert_allclose(pieces_btd, whole_btd, rtol=1e-5, atol=1e-6)
