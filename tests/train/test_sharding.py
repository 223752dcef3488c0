"""Any plan computes what one device computes: loss, every gradient, one optimizer step."""

import dataclasses
import itertools
import os

import numpy as np
import pytest
from tests.helpers import hybrid, run_config
from tests.train.chosen import DRAWN, EIGHT, SEEDS, TWELVE, choices, count_pairs, drawn, unmet
from tests.train.plans import CHOICES, describe

from orogen.config.checks import ConfigError
from orogen.train.verify import GRADIENT, LOSS, MARGIN, OPTIMIZERS, PARAMETER, default_train, largest, verify

COUNT = int(os.environ.get("OROGEN_PLANS", EIGHT))
CHOSEN = [drawn(seed) for seed in SEEDS]
# More than are chosen are drawn at random.
RUNS = [*CHOSEN, *map(drawn, range(DRAWN, DRAWN + COUNT - TWELVE))][:COUNT]


@pytest.mark.parametrize("number", range(len(RUNS)), ids=[f"{i}-{one.name}" for i, one in enumerate(RUNS)])
def test_a_plan_equals_one_device(number):
    run = RUNS[number].run
    verdict = verify(run, optimizers=OPTIMIZERS[number % 2 :][:1])
    assert verdict.loss_error <= LOSS, describe(run.plan)
    assert verdict.max_gradient_error <= GRADIENT, (verdict.worst_leaf, describe(run.plan))
    assert verdict.max_parameter_error <= PARAMETER
    assert verdict.flip_margin <= MARGIN
    assert verdict.passed, (verdict, describe(run.plan))


def test_the_sample_covers_every_axis_and_choice():
    """`python -m tests.train.chosen` chooses again."""
    assert unmet(CHOSEN[:EIGHT]) == []
    assert count_pairs(CHOSEN[:EIGHT]) >= 780
    assert len(CHOSEN) == TWELVE and count_pairs(CHOSEN) >= 930


def test_a_sample_without_dropless_experts_over_ranks_is_noticed():
    dropless = "dropless experts over ranks"
    assert f"{dropless}: 0 of 2" in unmet([one._replace(kinds=one.kinds - {dropless}) for one in CHOSEN])


def test_pairs_are_of_choices_that_something_reads():
    """Attention without Mamba, on one rank of data and context; experts on one rank without drops."""
    plan = {"tensor": 2, "fsdp": "parameters", "context_ssm": "heads", "shift": "alltoall"}
    model = hybrid(pattern="*E", mtp_depths=0)
    fields = {field for field, _ in choices("each layer", run_config(model, plan=plan))}
    unread = {"fsdp", "dispatch", "drop_policy", "context_attention", "context_ssm", "shift"}
    assert fields >= set(CHOICES) - unread and not fields & unread
    plan = {"context": 2, "expert": 2, "fsdp": "parameters", "capacity_factor": 1.0}
    fields = {field for field, _ in choices("each layer", run_config(model, plan=plan))}
    assert fields >= unread - {"context_ssm"} and not fields & {"context_ssm", "stream"}


SHARDED = list(itertools.product(("optimizer", "gradients", "parameters"), (None, 2)))


# Every kind with three microbatches, whose sums must stay apart; with one, each level of sharding, and only AdamW. Muon
# updates at each level, and where runs have two ranks. One of the families below has two microbatches without sharding.
@pytest.mark.parametrize(
    ("fsdp", "fsdp_size", "microbatches", "optimizer"),
    [
        *((*kind, 3, OPTIMIZERS[i in (1, 2, 5)]) for i, kind in enumerate(SHARDED)),
        *((*SHARDED[i], 1, "adamw") for i in (0, 3, 5)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("one_device_once")
def test_what_is_sharded_over_data_changes_no_gradient_and_no_update(fsdp, fsdp_size, microbatches, optimizer):
    # With three microbatches, each expert has two replicas within a run of two data ranks; otherwise runs are narrower.
    plan = {"data": 4, "tensor": 2, "expert": 4 if microbatches == 1 else 2, "microbatches": microbatches}
    plan |= {"fsdp": fsdp, "fsdp_size": fsdp_size}
    # A few layers have parameters for every kind of split; more would only take longer to compile.
    model = hybrid(pattern="ME*/-" if microbatches == 1 else "*E/-", mtp_depths=1)
    run = run_config(model, plan=plan, batch_size=4 * microbatches, sequence_length=40)
    verdict = verify(run, optimizers=(optimizer,))
    assert verdict.passed, verdict
    assert not verdict.zero_leaves


@pytest.mark.parametrize(
    ("plan", "optimizer"),
    [({"tensor": 2}, "adamw"), ({"data": 2, "tensor": 4, "fsdp": "parameters", "remat": "full"}, "muon")],
    ids=str,
)
@pytest.mark.usefixtures("one_device_once")
def test_mamba_layers_with_biases_equal_one_device(plan, optimizer):
    """Both Mambas, biased; the gated norm's one group spans ranks that B's and C's two groups do not."""
    model = hybrid(
        pattern="mM", mtp_depths=0, mamba_intermediate_size=40, time_step_rank=3, mamba_proj_bias=True,
        mamba_norm_groups=1, time_step_min=0.002, time_step_max=0.09,
    )  # fmt: skip
    verdict = verify(run_config(model, plan=plan, batch_size=4, sequence_length=40), optimizers=(optimizer,))
    assert verdict.passed, verdict
    assert not verdict.zero_leaves


# Experts, routers, norms and embeddings of other families, on plans that shard all of them.
FAMILIES = {
    "gpt-oss": {
        "pattern": "*E-", "norm": "rms_cast_first", "mlp_gated": True, "mlp_hidden_act": "silu", "mlp_bias": True,
        "swiglu_limit": 0.5, "router_score": "softmax_topk", "router_bias": True, "router_correction_bias": False,
        "moe_latent_size": None, "moe_shared_expert_intermediate_size": None, "mtp_depths": 0,
    },
    "qwen2": {
        "pattern": "E-/E", "norm": "layer", "mlp_gated": True, "mlp_hidden_act": "silu", "router_score": "softmax",
        "norm_topk_prob": False, "moe_shared_expert_gate": True, "router_correction_bias": False,
        "tie_word_embeddings": True, "learned_positions": 40, "mtp_depths": 1,
    },
    "deepseek": {
        "pattern": "E-", "norm": "layer_1p", "mlp_gated": True, "mlp_bias": True, "mlp_hidden_act": "gelu_tanh",
        "n_group": 4, "topk_group": 2, "tie_word_embeddings": True, "mtp_depths": 0,
    },
    # Biases around the routed experts: of the shared expert and of the latent projections.
    "nemotron": {"pattern": "E-", "mlp_bias": True, "moe_bias": "shared", "mtp_depths": 0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        ("gpt-oss", {"data": 2, "tensor": 4, "expert": 4, "fsdp": "parameters", "dispatch": "alltoall"}),
        ("gpt-oss", {"tensor": 2, "expert": 2, "dispatch": "allgather", "capacity_factor": 1.0}),
        ("qwen2", {"data": 2, "tensor": 2, "expert": 4, "fsdp": "parameters", "dispatch": "allgather"}),
        (
            "gpt-oss",
            {"data": 2, "tensor": 4, "expert": 2, "expert_tensor": 2, "fsdp": "parameters", "dispatch": "ragged"},
        ),
        ("qwen2", {"data": 4, "tensor": 2, "expert": 2, "expert_tensor": 4, "dispatch": "allgather"}),
        (
            "deepseek",
            {
                "data": 2,
                "tensor": 2,
                "expert": 2,
                "expert_tensor": 2,
                "dispatch": "ragged",
                "capacity_factor": 1.0,
                "drop_policy": "probs",
                "buffer_factor": 4.0,
            },
        ),
        ("deepseek", {"data": 4, "expert": 2, "expert_tensor": 2, "fsdp": "gradients", "dispatch": "alltoall"}),
        (
            "nemotron",
            {"data": 2, "tensor": 2, "expert": 2, "expert_tensor": 2, "fsdp": "parameters", "dispatch": "alltoall"},
        ),
        # Choices that random plans do not make.
        (
            "deepseek",
            {"data": 2, "context": 2, "tensor": 2, "remat": "elementwise", "cross_entropy": "full", "microbatches": 2},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(v) for v in value.values()),
)
@pytest.mark.usefixtures("one_device_once")
def test_a_plan_equals_one_device_for_every_family(family, plan):
    run = run_config(hybrid(**FAMILIES[family]), plan=plan, batch_size=8, sequence_length=40)
    verdict = verify(run, optimizers=("adamw",))
    assert verdict.passed, verdict
    assert not verdict.zero_leaves
    assert (verdict.dropped_tokens > 0) == ("capacity_factor" in plan)


def test_verify_notices_a_gradient_summed_over_the_wrong_ranks(monkeypatch):
    from orogen.train import step

    honest = step.gradients

    def doubled(built, objective, config, plan, dtype, **flags):
        function = honest(built, objective, config, plan, dtype, **flags)

        def call(*arguments):
            loss, grads, counts, sums = function(*arguments)
            grads["norm"]["weight"] = grads["norm"]["weight"].replace(
                grads["norm"]["weight"][...] * (2 if plan.config.tensor > 1 else 1)
            )
            return loss, grads, counts, sums

        return call

    monkeypatch.setattr("orogen.train.verify.gradients", doubled)
    verdict = verify(run_config(hybrid(pattern="-", mtp_depths=0), plan={"tensor": 2}), optimizers=("adamw",))
    assert not verdict.passed
    assert verdict.worst_leaf == "norm.weight"
    assert verdict.max_gradient_error == pytest.approx(1)


def test_a_plan_that_overflows_a_buffer_does_not_pass():
    plan = {"data": 2, "expert": 2, "dispatch": "ragged", "buffer_factor": 0.25}
    verdict = verify(run_config(hybrid(pattern="E", mtp_depths=0), plan=plan), optimizers=("adamw",))
    assert verdict.overflow_rows > 0 and not verdict.passed
    equal = dict.fromkeys(("loss_error", "max_gradient_error", "max_parameter_error", "load_error", "flip_margin"), 0)
    assert not verdict._replace(**equal).passed
    assert verdict._replace(**equal, overflow_rows=0).passed


@pytest.mark.parametrize("plan", [{"tensor": 3}, {"context": 2}, {"context": 5, "tensor": 3}, {"data": 7}], ids=str)
@pytest.mark.parametrize("taps", [4, 20])
def test_the_batch_that_verify_makes_up_fits_plan_and_model(plan, taps):
    config = dataclasses.replace(run_config(hybrid(conv_kernel=taps), plan=plan), train=None)
    dataclasses.replace(config, train=default_train(config)).check()


def test_a_difference_that_is_no_number_is_the_largest():
    assert np.isnan(largest([0.0, np.nan, 1.0])) and largest([]) == 0


def test_verify_notices_an_expert_counted_twice(monkeypatch):
    from orogen.train import step

    honest = step.gradients

    def miscounting(built, objective, config, plan, dtype, **flags):
        function = honest(built, objective, config, plan, dtype, **flags)

        def call(*arguments):
            loss, grads, counts, sums = function(*arguments)
            first, *rest = sums.load
            first = first.at[..., 0].multiply(2 if plan.config.tensor > 1 else 1)
            return loss, grads, counts, sums._replace(load=[first, *rest])

        return call

    monkeypatch.setattr("orogen.train.verify.gradients", miscounting)
    verdict = verify(run_config(hybrid(pattern="E", mtp_depths=0), plan={"tensor": 2}), optimizers=("adamw",))
    assert not verdict.passed and verdict.load_error > 0
    assert verdict.loss_error <= LOSS and verdict.max_gradient_error <= GRADIENT


def test_verify_needs_a_token_with_a_target():
    with pytest.raises(ConfigError) as caught:
        verify(run_config(sequence_length=2))
    assert str(caught.value) == (
        "TrainConfig.sequence_length is 2; expected a longer one: no token of the batches to check has a target"
    )
