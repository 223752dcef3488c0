"""What cannot fit into memory is refused before anything is built, by a bound that is never above what is held."""

import dataclasses

import pytest
from tests.helpers import hybrid, run_config

from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.run import TrainConfig
from orogen.model.count import count as built_count
from orogen.simulate.fit import (
    Memory,
    count,
    require_inference_fits,
    require_scoring_fits,
    require_training_fits,
    require_verification_fits,
)

PLENTY = 2**60
# One dense layer: 7 · 6 embedding, 6 + 6 norms, 6 · 10 + 10 · 6 matrices, 6 · 7 head.
DENSE = ModelConfig(pattern="-", vocab_size=7, hidden_size=6, intermediate_size=10)
PARAMETERS = 42 + 12 + 120 + 42


def refusal(check, *arguments, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        check(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def training(*, plan=None, memory=None, optimizer=None, model=DENSE, **train):
    run = run_config(model, plan=plan, **{"batch_size": 2, "sequence_length": 3, "sample_tokens": 1, **train})
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, **(optimizer or {})))
    return run, memory or Memory(0, None)


@pytest.mark.parametrize("changes", [{}, {"pattern": "M+wm-*", "mtp_depths": 0}, {"tie_word_embeddings": True}])
def test_parameters_are_counted_as_the_model_has_them(changes):
    more = {
        "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3, "rope_theta": 1e4,
        "sliding_window": 4, "mamba_intermediate_size": 10, "time_step_rank": 3, "router_correction_bias": False,
    }  # fmt: skip
    model = hybrid(**more, **changes)
    assert count(model) == built_count(model)["total"]


def test_the_first_step_of_one_device_by_hand():
    """Masters and two moments, then gradients beside them; the batch is 16 bytes a token."""
    state, gradients, batch = 12 * PARAMETERS, 4 * PARAMETERS, 16 * 6
    total = state + gradients + batch
    require_training_fits(*training(memory=Memory(total, None)))
    assert refusal(require_training_fits, *training(memory=Memory(total - 1, None))) == (
        f"ModelConfig.intermediate_size is 10; expected less: training needs at least {total:,} bytes of memory, "
        f"{state:,} of them for parameters and the optimizer's state, and this host has {total - 1:,}"
    )


@pytest.mark.parametrize(
    ("optimizer", "each"),
    [({}, 16), ({"moment_dtype": "bfloat16"}, 12), ({"name": "muon"}, 12)],
)
def test_moments_count_as_they_are_kept(optimizer, each):
    total = each * PARAMETERS + 16 * 6
    require_training_fits(*training(memory=Memory(total, None), optimizer=optimizer))
    refusal(require_training_fits, *training(memory=Memory(total - 1, None), optimizer=optimizer))


def test_simulated_devices_share_the_host_and_real_ones_do_not():
    each, batch = 16 * PARAMETERS, 16 * 6
    require_training_fits(*training(plan={"data": 2}, memory=Memory(2 * each + batch, None)))
    message = refusal(require_training_fits, *training(plan={"data": 2}, memory=Memory(2 * each + batch - 1, None)))
    assert message.endswith(f"and this host has {2 * each + batch - 1:,}")
    own = each + batch // 2
    require_training_fits(*training(plan={"data": 2}, memory=Memory(batch, own)))
    message = refusal(require_training_fits, *training(plan={"data": 2}, memory=Memory(batch, own - 1)))
    assert message.endswith(f"and each device has {own - 1:,}")


@pytest.mark.parametrize("plan", [{"tensor": 2}, {"data": 2, "fsdp": "optimizer"}])
def test_what_a_plan_splits_counts_once(plan):
    require_training_fits(*training(plan=plan, memory=Memory(16 * PARAMETERS + 16 * 6, None), sequence_length=3))


HUGE = [
    ("TrainConfig.batch_size", {"batch_size": 99_999_999_999}, {}, {}),
    ("TrainConfig.sequence_length", {"sequence_length": 99_999_999_999}, {}, {}),
    ("TrainConfig.batch_size", {"batch_size": 99_999_999_999}, {"microbatches": 99_999_999_999}, {}),
    ("ModelConfig.vocab_size", {}, {}, {"vocab_size": 99_999_999_999}),
    ("ModelConfig.hidden_size", {}, {}, {"hidden_size": 99_999_999_999}),
    ("ModelConfig.intermediate_size", {}, {}, {"intermediate_size": 99_999_999_999}),
    (
        "ModelConfig.pattern",
        {},
        {},
        {"pattern": "-" * 1024, "hidden_size": 900, "intermediate_size": 900, "mlp_gated": True},
    ),
    (
        "ModelConfig.hidden_size",
        {},
        {},
        {"vocab_size": 99_999_999_997, "hidden_size": 99_999_999_999, "intermediate_size": 99_999_999_998},
    ),
    ("ModelConfig.head_dim", {}, {}, {"pattern": "*", "num_attention_heads": 8, "head_dim": 99_999_999_999}),
    ("TrainConfig.sample_tokens", {"sample_tokens": 2**20 - 1}, {}, {"pattern": "*", "num_attention_heads": 8}),
]


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize(("field", "train", "plan", "model"), HUGE)
def test_the_field_that_is_too_large_is_named(field, train, plan, model, where):
    sizes = {"vocab_size": 7, "hidden_size": 6, "intermediate_size": 10, "num_key_value_heads": 2, "head_dim": 2}
    changed = ModelConfig(**{"pattern": "-", **sizes, **model})
    memory = Memory(2**35, None) if where == "host" else Memory(PLENTY, 2**35)
    message = refusal(require_training_fits, *training(model=changed, plan=plan, memory=memory, **train))
    assert message.startswith(f"{field} is ")
    require_training_fits(*training(model=changed, plan=plan, memory=Memory(2**200, None), **train))


def test_verification_holds_parameters_and_both_gradients():
    run = dataclasses.replace(run_config(DENSE, plan={"data": 2}), train=None)
    train = TrainConfig(steps=1, batch_size=4, sequence_length=52, seed=0)
    total = 8 * PARAMETERS + 2 * 4 * PARAMETERS + 16 * 4 * 52
    require_verification_fits(run, train, host=total)
    assert refusal(require_verification_fits, run, train, host=total - 1).endswith(f"this host has {total - 1:,}")


@pytest.mark.parametrize("axis", ["data", "microbatches"])
def test_verification_names_the_plan_that_its_own_batch_follows_from(axis):
    run = dataclasses.replace(run_config(DENSE, plan={axis: 10**9}), train=None)
    train = TrainConfig(steps=1, batch_size=2 * 10**9, sequence_length=52, seed=0)
    message = refusal(require_verification_fits, run, train, host=2**33)
    assert message.startswith(f"PlanConfig.{axis} is 1000000000; expected less: verification needs at least ")


def test_inference_counts_scores_unless_attention_goes_by_blocks():
    model = hybrid(pattern="*-", mtp_depths=0)
    held = 4 * count(model) + 4 * 3 * 500 * 48
    scores = 4 * 3 * 24 * 500**2
    settings = {"--tokens": 500}
    passes = {"rows": 3, "tokens": 500, "settings": settings}
    require_inference_fits(model, Memory(0, held), blocked=True, **passes)
    refusal(require_inference_fits, model, Memory(0, held - 1), blocked=True, **passes)
    require_inference_fits(model, Memory(0, held + scores), blocked=False, **passes)
    message = refusal(require_inference_fits, model, Memory(0, held + scores - 1), blocked=False, **passes)
    assert message.startswith(f"--tokens is 500; expected less: inference needs at least {held + scores:,} bytes")


def test_scoring_keeps_the_logits_of_all_rows_and_passes_over_some():
    rows, tokens = 9000, 3
    held = 4 * PARAMETERS + 4 * (8192 // 3) * 3 * 6
    logits = 4 * rows * tokens * 7
    require_scoring_fits(DENSE, Memory(held + logits, None), blocked=False, rows=rows, tokens=tokens)
    message = refusal(
        require_scoring_fits, DENSE, Memory(held + logits - 1, None), blocked=False, rows=rows, tokens=tokens
    )
    assert message.startswith("rows of --tokens is 9000; expected less")
