"""What cannot fit into memory is refused before anything is built, by a bound that never exceeds what is held."""

import dataclasses

import pytest
from tests.helpers import hybrid, run_config

from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
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
    """Master parameters, two moments and gradients; the batch takes 16 bytes per token."""
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
    (
        "TrainConfig.sample_tokens",
        {"sample_tokens": 2**20 - 1},
        {},
        {"pattern": "*", "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 1024},
    ),
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


def test_inference_holds_weights_caches_snapshots_logits_and_counts():
    """Three Mamba-2 layers and one attention layer; the numbers by hand."""
    model = hybrid(pattern="MM*M", mtp_depths=0)
    engine = EngineConfig(slots=4, max_length=100, page=16, chunk=16, prefill_tokens=16, snapshots=5)
    heads, size = model.mamba_num_heads, model.mamba_head_dim
    channels = heads * size + 2 * model.n_groups * model.ssm_state_size
    state = 4 * (heads * size * model.ssm_state_size + (model.conv_kernel - 1) * channels)
    page = 4 * 16 * 2 * model.num_key_value_heads * model.head_dim
    pages = 4 * 7  # of 16 tokens, for 4 slots of at most 100
    caches = 4 * 3 * state + pages * page + 4 * 4 * 1  # and a page table of one page per slot
    snapshots = 5 * 3 * state + page + 5 * 4 * 1  # with a page of its own
    logits = 4 * 4 * model.vocab_size
    counts = (4 + 1) * 5 * model.vocab_size  # of 4 slots, and of one prompt that is read at a time
    total = 4 * count(model) + caches + snapshots + logits + counts

    def fits(memory: int, engine: EngineConfig = engine, plan: PlanConfig | None = None, **settings: int) -> None:
        require_inference_fits(model, plan, engine, Memory(0, memory), settings=settings)

    fits(total)
    message = refusal(fits, total - 1)
    assert f"inference needs at least {total:,} bytes" in message and f"has {total - 1:,}" in message
    # bfloat16 halves the bytes of weights, pages and windows, not those of states, tables and logits.
    half = dataclasses.replace(engine, compute_dtype="bfloat16", snapshots=0, prefix_cache=False)
    windows = 3 * 2 * (model.conv_kernel - 1) * channels  # the bytes saved in the windows of 3 layers
    one = 3 * state + page + 4 * 1  # without a prefix cache
    halved = 2 * count(model) + caches + one - 5 * windows - (pages + 1) * page // 2 + logits + counts
    fits(halved, half)
    refusal(fits, halved - 1, half)


def test_what_is_too_much_for_inference_is_named():
    model = hybrid(pattern="M*", mtp_depths=0)

    def message(settings: dict[str, int] | None = None, **fields: int) -> str:
        memory, engine = Memory(0, 2**33), EngineConfig(**fields)
        return refusal(require_inference_fits, model, None, engine, memory, settings=settings or {})

    assert message(slots=10**8).startswith("EngineConfig.slots is 100000000; expected less: inference")
    assert message(snapshots=10**9).startswith("EngineConfig.snapshots is 1000000000; expected less: inference")
    assert message(max_length=10**9).startswith("EngineConfig.max_length is 1000000000; expected less: inference")
    assert message(pages=10**9).startswith("EngineConfig.pages is 1000000000; expected less: inference")
    settings = {"--tokens": 999_999_999}
    assert message(max_length=10**9, settings=settings).startswith("--tokens is 999999999; expected less: inference")


def test_a_plan_splits_what_inference_holds():
    model = hybrid(pattern="M*", mtp_depths=0)
    engine = EngineConfig(slots=4, max_length=64, snapshots=3)
    least = {}
    for tensor in (1, 2):
        low, high = 0, 2**30
        while low < high:
            middle = (low + high) // 2
            try:
                require_inference_fits(model, PlanConfig(tensor=tensor), engine, Memory(0, middle), settings={})
                high = middle
            except ConfigError:
                low = middle + 1
        least[tensor] = low
    assert least[2] < 0.6 * least[1]


def test_scoring_keeps_the_logits_of_all_rows_and_passes_over_some():
    rows, tokens = 9000, 3
    held = 4 * PARAMETERS + 4 * (8192 // 3) * 3 * 6
    logits = 4 * rows * tokens * 7
    require_scoring_fits(DENSE, Memory(held + logits, None), blocked=False, rows=rows, tokens=tokens)
    message = refusal(
        require_scoring_fits, DENSE, Memory(held + logits - 1, None), blocked=False, rows=rows, tokens=tokens
    )
    assert message.startswith("rows of --tokens is 9000; expected less")
