"""States carried from batch to batch: against sequences as long as both, under plans, and through a stop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.helpers import hybrid, run_config, several_devices
from tests.model.small import config, model_parts, one_device, relative_error

from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.config.plan import PlanConfig
from orogen.config.run import TrainConfig
from orogen.cost.ledger import Workload
from orogen.data.packing import NEXT, NEXT_WEIGHT, NOTHING, Batch
from orogen.layers.documents import documents
from orogen.model.cache import EMPTY
from orogen.model.lm import build
from orogen.parallel.plan import make_plan
from orogen.report.metrics import read_metrics
from orogen.simulate.memory import describe_memory
from orogen.train import carry
from orogen.train.next_token import LOSS, NEXT_TOKENS
from orogen.train.pretraining import PRETRAINING
from orogen.train.run import train
from orogen.train.step import batch_to_devices, gradients
from orogen.train.verify import verify

ROWS, LENGTH = 4, 8
# Two rows of LENGTH each, one after the other: a document across both; one that ends with the first row; one that
# begins at that row's last token; several.
SEGMENTS = np.array(
    [[1] * 16, [1] * 8 + [2] * 8, [1] * 7 + [2] * 9, [1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4]], np.int32
)


def lanes(model, count: int = 2) -> tuple[Batch, list[Batch]]:
    """A batch with rows of 2 LENGTH tokens, and the same tokens in `count` batches."""
    tokens_bt = np.random.default_rng(1).integers(model.vocab_size, size=SEGMENTS.shape, dtype=np.int32)
    positions_bt = np.asarray(documents(SEGMENTS).positions_bt)
    weights_bt = (positions_bt > 0).astype(np.float32)
    ends_bt = np.diff(SEGMENTS, axis=1, append=0) != 0
    next_bt = np.where(ends_bt, NOTHING, np.roll(tokens_bt, -1, axis=1)).astype(np.int32)
    whole = Batch(tokens_bt, SEGMENTS, positions_bt, weights_bt)
    named = whole._replace(extras={NEXT: next_bt, NEXT_WEIGHT: (~ends_bt).astype(np.float32)})
    return whole, [named.map(lambda x_bt, i=i: np.split(x_bt, count, axis=1)[i]) for i in range(count)]


@pytest.mark.parametrize(("microbatches", "pieces"), [(1, 2), (2, 8)])
def test_rows_one_after_another_have_the_nats_of_one_row(microbatches, pieces):
    """A scanned repetition and both Mambas, also with rows shorter than the convolutions' windows; no attention, which
    would see each row alone."""
    model = config(pattern="MM-m", mtp_depths=0, chunk_size=3)
    plan, built = one_device(model, microbatches=microbatches), build(model)
    _, params, buffers = model_parts(model)
    settings = TrainConfig(steps=1, batch_size=ROWS, sequence_length=2 * LENGTH // pieces, seed=0, carry_states=True)
    abstract = carry.abstract(settings, built)
    whole, rows = lanes(model, pieces)
    alone = jax.jit(gradients(built, NEXT_TOKENS, model, plan, "float32"))(
        params, buffers, batch_to_devices(whole, plan)
    )
    run = jax.jit(gradients(built, NEXT_TOKENS, model, plan, "float32", carried=abstract))
    carried, nats, counted = carry.emptied(abstract), 0, 0
    for row in rows:
        _, _, counts, sums = run(params, buffers, batch_to_devices(row, plan), None, carried)
        carried, nats, counted = sums.carried, nats + sums.metrics[LOSS], counted + counts.metrics[LOSS]
    assert counted == alone[2].metrics[LOSS]
    assert relative_error(nats, alone[3].metrics[LOSS]) < 1e-6


def test_gradients_are_those_of_a_row_with_the_states_that_it_is_given():
    """By a finite difference in the parameters, with the states of the first row held fixed."""
    model = config(pattern="M", mtp_depths=0, vocab_size=11)
    plan, built = one_device(model), build(model)
    _, params, buffers = model_parts(model)
    settings = TrainConfig(steps=1, batch_size=ROWS, sequence_length=LENGTH, seed=0, carry_states=True)
    abstract = carry.abstract(settings, built)
    run = jax.jit(gradients(built, NEXT_TOKENS, model, plan, "float32", carried=abstract))
    first, second = (batch_to_devices(half, plan) for half in lanes(model)[1])
    carried = run(params, buffers, first, None, carry.emptied(abstract))[3].carried
    _, grads, _, _ = run(params, buffers, second, None, carried)
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    step = 2e-3
    moved = [jax.tree.map(lambda p, d, s=s: p + s * step * d, params, direction) for s in (1, -1)]
    up, down = (run(p, buffers, second, None, carried)[0] for p in moved)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.vdot(g, d), grads, direction)))
    np.testing.assert_allclose((up - down) / (2 * step), slope, rtol=3e-3)


@several_devices
@pytest.mark.parametrize(
    "plan",
    [{"data": 2, "tensor": 4, "fsdp": "parameters"}, {"data": 2, "microbatches": 2, "offload_optimizer": True}],
    ids=str,
)
def test_a_plan_carries_what_one_device_does(plan, monkeypatch):
    """There are fewer groups than tensor ranks, so several ranks hold the same windows. A CPU has a single memory,
    which stands for the host's too."""
    monkeypatch.setattr("orogen.parallel.placement.HOST", "device")
    monkeypatch.setattr("orogen.parallel.mesh.HAS_HOST_MEMORY", ("cpu",))
    changes = {"router_balance": "global", "mamba_intermediate_size": 16, "time_step_rank": 3}
    model = hybrid(pattern="MEm", mtp_depths=0, **changes)
    settings = run_config(model, plan=plan, batch_size=8, sequence_length=16, carry_states=True)
    verdict = verify(settings, what="step")
    assert max(verdict.loss_error, verdict.max_gradient_error, verdict.max_parameter_error) < 1e-5


@pytest.mark.parametrize(
    ("change", "near"), [({"linear": "fp8"}, 0.25), ({"offload": ("input", "conv")}, 2e-6)], ids=str
)
def test_states_are_carried_under_fp8_and_offloading(change, near):
    """Loss and gradient of a batch from given states, and the states that it leaves, are the same as without the
    change. In 8 bits a gradient is rounded by up to an eighth."""
    model = hybrid(pattern="MMm", mtp_depths=0, mamba_intermediate_size=48, time_step_rank=3)
    built, (_, params, buffers) = build(model), model_parts(model)
    settings = TrainConfig(steps=1, batch_size=ROWS, sequence_length=LENGTH, seed=0, carry_states=True)
    abstract, plain = carry.abstract(settings, built), one_device(model)
    # Built without make_plan's check that devices have a memory of their own: on a CPU, offloading moves nothing.
    recipes = make_plan(PlanConfig(linear=change.get("linear", "plain")), model).recipes
    changed = dataclasses.replace(plain, config=PlanConfig(**change), recipes=recipes)
    first, second = (batch_to_devices(half, plain) for half in lanes(model)[1])

    def compiled(plan):
        function = jax.jit(gradients(built, NEXT_TOKENS, model, plan, "float32", carried=abstract))

        def run(batch, carried):
            loss, grads, _, sums = function(params, buffers, batch, None, carried)
            return loss, grads, sums.carried

        return run

    run_plain, run_changed = compiled(plain), compiled(changed)
    carried = run_plain(first, carry.emptied(abstract))[2]
    wanted, found = run_plain(second, carried), run_changed(second, carried)
    for part, other in zip(found, wanted, strict=True):
        assert relative_error(part, other) < near
    assert (change.keys() == {"linear"}) == (relative_error(found[0], wanted[0]) > 1e-5), "products are rounded"
    alone = run_changed(second, carry.emptied(abstract))
    assert relative_error(alone[0], found[0]) > 1e-4, "what is carried is read"


def test_nothing_is_carried_past_a_step_that_was_skipped():
    model = config(pattern="Mm", mtp_depths=0)
    settings = TrainConfig(steps=1, batch_size=ROWS, sequence_length=LENGTH, seed=0, carry_states=True)
    left = jax.tree.map(lambda a: jnp.full(a.shape, 7, a.dtype), carry.abstract(settings, build(model)))
    kept, emptied = (jax.tree.leaves(carry.after(left, jnp.asarray(finite))) for finite in (True, False))
    assert all((a == 7).all() for a in kept)
    assert [set(np.unique(a).tolist()) for a in emptied] == [{EMPTY} if a.dtype == jnp.int32 else {0} for a in emptied]


def test_a_run_goes_on_with_its_states(tmp_path):
    """To the bit, in bfloat16, with the text of every row in order."""
    (tmp_path / "text").mkdir()
    for number in range(5):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} " * (30 + 40 * number))
    bindings = [
        "ModelConfig.pattern = 'Mm'", "ModelConfig.vocab_size = 259", "ModelConfig.hidden_size = 8",
        "ModelConfig.mamba_num_heads = 2", "ModelConfig.mamba_head_dim = 4", "ModelConfig.n_groups = 1",
        "ModelConfig.ssm_state_size = 4", "ModelConfig.chunk_size = 8", "ModelConfig.mamba_intermediate_size = 8",
        "ModelConfig.time_step_rank = 2", f"DataConfig.corpus = '{tmp_path / 'text'}'", "DataConfig.tokenizer = 'byte'",
        "DataConfig.heldout_fraction = 0.0", "DataConfig.tuning_fraction = 0.0",
        "TrainConfig.batch_size = 2", "TrainConfig.sequence_length = 16", "TrainConfig.seed = 1",
        "TrainConfig.compute_dtype = 'bfloat16'", "TrainConfig.carry_states = True",
        "OptimizerConfig.learning_rate = 3e-3", "OptimizerConfig.schedule = 'constant'",
    ]  # fmt: skip

    def run(folder, *, steps=4, resume=False):
        config = load([], [*bindings, f"TrainConfig.steps = {steps}"])
        train(*config, tmp_path / folder, PRETRAINING, resume=resume, log=lambda _: None)
        return [record["loss"] for record in read_metrics(tmp_path / folder)]

    whole = run("whole")
    assert len(run("parts", steps=2)) == 2
    assert run("parts", resume=True) == whole


def test_what_is_carried_is_part_of_a_plans_memory():
    config = run_config(hybrid(pattern="MM", mtp_depths=0), plan={"data": 2}, carry_states=True)
    found = describe_memory(config, Workload(rows=2, tokens=24))["state"]["carried"]
    rows, model = config.train.batch_size // 2, config.model
    inner, states = model.mamba_num_heads * model.mamba_head_dim, 2 * model.n_groups * model.ssm_state_size
    window = (model.conv_kernel - 1) * (inner + states + 1)  # and the document ids of the windows
    assert found == 2 * rows * 4 * (window + inner * model.ssm_state_size)


def test_refusals():
    model = hybrid(pattern="M*", mtp_depths=0)
    for axis in ("context", "stage"):
        changes = {"batch_size": 8, "sequence_length": 32, "carry_states": True}
        with pytest.raises(ConfigError, match=rf"PlanConfig.{axis} is 2; expected 1: TrainConfig.carry_states is True"):
            run_config(model, plan={axis: 2}, **changes).check()
    learned = dataclasses.replace(model, learned_positions=64)
    with pytest.raises(ConfigError, match="carry_states is True; expected False: ModelConfig.learned_positions"):
        run_config(learned, carry_states=True, sample_tokens=8).check()
