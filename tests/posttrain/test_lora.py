"""Low-rank adapters: what they compute, what they train, and what a run with them is as a checkpoint."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.convert.test_peer import without_clamp
from tests.helpers import bound, hybrid, run_config, several_devices, write_recipe
from tests.posttrain.test_rl import RECIPE
from tests.posttrain.test_rl import run as rollouts

from orogen.checkpoint import adapters, folders
from orogen.checkpoint.folders import RunFolder
from orogen.checkpoint.leaves import leaves_of
from orogen.checkpoint.open import open_model
from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.lora import LoraConfig, adapted
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig
from orogen.cost.assemble import assemble
from orogen.layers import adapter
from orogen.layers.adapter import apart, is_factor, merged
from orogen.layers.documents import Documents
from orogen.layers.parameter import parameter
from orogen.model.lm import build, initial_state
from orogen.parallel.plan import single_device_plan
from orogen.precision.policy import DTYPES
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.sides import packed_batch, with_open_gates
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices, make_step
from orogen.train.trained import narrow_frozen, optimizer_of, trained_mask
from orogen.train.verify import verify

EVERYTHING = ("attention", "mamba", "dense", "shared", "latent", "routed")
LATENT = {"kv_lora_rank": 7, "q_lora_rank": 6, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 5,
          "rope_theta": 100.0}  # fmt: skip
MODEL = hybrid(
    pattern="M*E-m+/*", num_attention_heads=6, mtp_depths=1, mlp_gated=True, mamba_intermediate_size=20,
    time_step_rank=3, **LATENT,
)  # fmt: skip
LORA = LoraConfig(rank=3, alpha=6.0, weights=EVERYTHING)


@functools.cache
def program(model):
    """The logits of a batch, of parameters and buffers."""
    rng = np.random.default_rng(0)
    tokens_bt = jnp.asarray(rng.integers(0, model.vocab_size, (2, 11)), jnp.int32)
    docs = Documents(jnp.asarray([[1] * 4 + [2] * 7, [1] * 8 + [0] * 3]), jnp.asarray([[*range(4), *range(7)]] * 2))
    built, plan = build(model), single_device_plan(PlanConfig(dispatch="allgather"), model)
    run = plan.run(
        lambda p, b: nnx.merge(built.graph, p, b).logits(tokens_bt, docs, plan),
        inputs=(plan.specs(built.params), plan.specs(built.buffers)), outputs=plan.spec(),
    )  # fmt: skip
    return jax.jit(run)


def logits(model, params, buffers):
    return np.asarray(program(model)(params, buffers))


@pytest.fixture(scope="module")
def whole():
    """An adapted model with all kinds of weights, its parameters with factors that are not zero, and its buffers."""
    model = adapted(MODEL, LORA)
    params, buffers = initial_state(model, 0)
    return model, with_open_gates(params), buffers


def test_every_weight_of_the_kinds_has_factors_of_its_own(whole):
    model, params, _ = whole
    base = leaves_of(build(MODEL).params)
    factors = {path for path in leaves_of(params) if is_factor(path)}
    weights = {path[:-1] for path in factors}
    named = {path[-1] for path in base if path in weights}
    assert named == {
        "z", "x", "B", "C", "dt", "out", "query", "key", "value", "up", "gate", "down", "latent_down", "latent_up",
        "query_down", "query_up", "key_rope", "key_up", "value_up",
    } and weights <= base.keys()  # fmt: skip
    without = {path for path in base.keys() - weights if len(base[path].get_metadata()["axes"]) > 1}
    # Convolutions, decays, Mamba-1's time steps, the router, the block of multi-token prediction, the vocabulary.
    assert {path[-1] for path in without} == {"weight", "A_log", "dt_down", "B", "C", "dt_up", "gate", "project"}
    lead = {path: leaf.get_value().shape for path, leaf in leaves_of(params).items()}
    for path in weights:
        *stacked, inputs, outputs = base[path].get_value().shape
        assert lead[*path, "lora_a"] == (*stacked, inputs, 3) and lead[*path, "lora_b"] == (*stacked, 3, outputs)


def test_adapters_compute_what_the_weights_with_their_products_compute(whole):
    model, params, buffers = whole
    added = merged(*apart(params), model.lora.scale)
    have, base = leaves_of(params), leaves_of(added)
    assert base.keys() == leaves_of(build(MODEL).params).keys()
    for path, leaf in base.items():
        value = np.asarray(leaf.get_value(), np.float64)
        if (*path, "lora_a") in have:
            weight, a, b = (np.asarray(have[*path, n].get_value(), np.float64) for n in ("weight", "lora_a", "lora_b"))
            expected = weight + 6.0 / 3 * np.einsum("...dr,...rf->...df", a, b)
            assert abs(expected - weight).max() > 1e-3
            np.testing.assert_allclose(value, expected, atol=1e-6)
        else:
            np.testing.assert_array_equal(value, np.asarray(have[path].get_value()))
    beside, inside = logits(model, params, buffers), logits(MODEL, added, buffers)
    np.testing.assert_allclose(beside, inside, atol=2e-5 * abs(inside).max())
    unadapted = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if any(getattr(key, "key", "") == "lora_b" for key in path) else x, params
    )
    plain = logits(MODEL, merged(*apart(unadapted), model.lora.scale), buffers)
    np.testing.assert_allclose(logits(model, unadapted, buffers), plain, atol=2e-6 * abs(plain).max())
    assert abs(plain - inside).max() > 1e-2


def config_of(model=None, dtype="float32", optimizer=None, lora=LORA, **plan):
    config = run_config(model or MODEL, plan=plan, batch_size=4, sequence_length=16, compute_dtype=dtype)
    return dataclasses.replace(
        config, lora=lora, optimizer=dataclasses.replace(config.optimizer, **(optimizer or {}))
    ).check()  # fmt: skip


def test_a_step_moves_the_factors_alone_and_what_is_frozen_is_narrow():
    model = hybrid(pattern="M*E-", mtp_depths=0)
    config = config_of(model, "bfloat16", {"trained": ("norm",)})
    plan, wide = assemble(config.model, config.plan, length=16)
    built, optimizer = narrow_frozen(wide, config), optimizer_of(config, wide)
    state = create_state(config.model, built, optimizer, plan, 0)
    before, biases = jax.device_get((leaves_of(state.params), leaves_of(state.buffers)))
    step = make_step(built, NEXT_TOKENS, config, plan, optimizer)
    for _ in range(2):  # A has no gradient while B is zero
        state, metrics = step(state, batch_to_devices(packed_batch(config, config.train), plan))
    after = leaves_of(state.params)
    moved = {p for p, leaf in before.items() if not np.array_equal(leaf.get_value(), after[p].get_value())}
    assert moved == {path for path in before if is_factor(path) or path == ("norm", "weight")}
    assert float(metrics.grad_norm) > 0
    for path, leaf in leaves_of(state.buffers).items():
        np.testing.assert_array_equal(leaf.get_value(), biases[path].get_value())
    for path, leaf in after.items():
        kept = path in moved or leaf.get_metadata()["float32"]
        assert leaf.get_value().dtype == DTYPES["float32" if kept else "bfloat16"], path
    held = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert held == 2 * sum(before[path].get_value().size for path in moved)


@several_devices
@pytest.mark.parametrize(
    "plan",
    [
        {"tensor": 2, "context": 2, "expert": 2, "dispatch": "allgather"},
        {"data": 4, "fsdp": "parameters", "expert": 2, "dispatch": "alltoall", "microbatches": 1},
        {"stage": 2, "microbatches": 2, "tensor": 2, "stream": "whole"},
    ],
    ids=["split", "sharded", "stages"],
)
def test_a_plan_trains_the_adapters_of_one_device(plan):
    model = hybrid(pattern="M-|M-" if "stage" in plan else "M*E-", mtp_depths=0)
    lora = dataclasses.replace(LORA, weights=("mamba", "dense")) if "stage" in plan else LORA
    verdict = verify(config_of(model, lora=lora, **plan), optimizers=("adamw",))
    assert verdict.passed, verdict


def trained(folder, recipe, *bindings):
    """The folders of a short run, and of one with adapters that starts from it, with the command of the latter."""
    base, run = folder / "base", folder / "run"
    given = bound("LoraConfig.rank=2", "LoraConfig.alpha=5.0", "OptimizerConfig.learning_rate=0.1", *bindings)
    command = ["train", "--gin_file", str(recipe), "--checkpoint", str(base), "--run", str(run), *given]
    assert main(["train", "--gin_file", str(recipe), "--run", str(base)]) == 0 and main(command) == 0
    return base, run, command


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return trained(folder, write_recipe(folder))


def test_a_run_with_adapters_opens_as_the_model_that_they_make(runs, capsys):
    base, run, command = runs
    with RunFolder(run) as folder:
        assert folder.config == RunFolder(base).config
        own, _ = folder.read_trained(build(folder.run.model), open_model(base).plan, "float32")
    was, now, have = leaves_of(open_model(base).params), leaves_of(open_model(run).params), leaves_of(own)
    assert was.keys() == now.keys()
    for path, leaf in now.items():
        weight, value = np.asarray(was[path].get_value()), np.asarray(leaf.get_value())
        if (*path, "lora_a") not in have:
            np.testing.assert_array_equal(value, weight)
            continue
        a, b = (np.asarray(have[*path, name].get_value(), np.float64) for name in ("lora_a", "lora_b"))
        np.testing.assert_allclose(value, weight + 2.5 * a @ b, atol=1e-5)
        assert abs(value - weight).max() > 1e-3
    assert main(["params", "--gin_file", str(run / "config.gin")]) == 0


def test_a_run_with_adapters_goes_on_to_the_bit(runs, tmp_path, capsys):
    """In bfloat16, and without the model that it started from."""
    _, _, command = runs
    base, given = command[4], command[7:]

    def arguments(folder, steps, *, adapters=given, start=("--checkpoint", base)):
        more = (
            f"TrainConfig.steps={steps}",
            "TrainConfig.compute_dtype='bfloat16'",
            "OptimizerConfig.schedule='constant'",
        )
        return [*command[:3], *start, "--run", str(tmp_path / folder), *adapters, *bound(*more)]

    assert main(arguments("whole", 4)) == 0 and main(arguments("parts", 2)) == 0
    assert main([*arguments("parts", 4, start=()), "--resume"]) == 0

    def params(name):
        with RunFolder(tmp_path / name) as folder:
            own = folder.read_trained(build(folder.run.model), open_model(tmp_path / name).plan, "float32")[0]
        return leaves_of(own)

    whole, parts = params("whole"), params("parts")
    for path, leaf in whole.items():
        np.testing.assert_array_equal(leaf.get_value(), parts[path].get_value(), err_msg=str(path))
    capsys.readouterr()
    for others, told in (
        ([*given, *bound("LoraConfig.weights=('dense',)")], "LoraConfig.weights is"),
        (
            bound("LoraConfig.rank=4", "LoraConfig.alpha=5.0", "OptimizerConfig.learning_rate=0.1"),
            "LoraConfig.rank is 2 there",
        ),
        (bound("OptimizerConfig.learning_rate=0.1"), "lora is present"),
    ):
        assert main([*arguments("whole", 5, adapters=others), "--resume"]) == 2
        assert told in capsys.readouterr().err


def test_rollouts_are_written_with_the_factors_that_train(tmp_path, monkeypatch):
    """Those are not zero here: a rollout without them would have other log-probabilities than the trainer."""
    (tmp_path / "rl.gin").write_text(RECIPE)

    def drawn(value, axes, **settings):
        return parameter(value + 0.1 * jnp.cos(jnp.arange(value.size)).reshape(value.shape), axes, **settings)

    monkeypatch.setattr(adapter, "parameter", drawn)
    found, (line,) = rollouts(
        tmp_path / "rl.gin", tmp_path / "run", "LoraConfig.rank = 2", "LoraConfig.weights = ('attention', 'dense')",
        "TrainConfig.steps = 1", "RLConfig.updates = 1",
    )  # fmt: skip
    factors = [leaf.get_value() for path, leaf in leaves_of(found.state.params).items() if path[-1] == "lora_b"]
    assert factors and min(float(abs(b).max()) for b in factors) > 0.05
    assert line["mismatch_max"] < 1e-5


def test_peft_files_hold_the_products(runs, tmp_path):
    from safetensors.numpy import load_file

    base, run, _ = runs
    assert main(["convert", "to-peft", str(run), str(tmp_path / "peft")]) == 0
    facts = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert facts["r"] == 2 and facts["lora_alpha"] == 5.0 and facts["peft_type"] == "LORA"
    was, now = leaves_of(open_model(base).params), leaves_of(open_model(run).params)
    place = {path[-1]: path for path in was}
    theirs = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out", "up_proj": "up",
              "down_proj": "down"}  # fmt: skip
    modules = facts["target_modules"]
    assert len(modules) == len(theirs) and len(tensors) == 12
    for module in modules:
        ours = place[theirs[module.split(".")[-1]]]
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        change = np.asarray(now[ours].get_value()) - np.asarray(was[ours].get_value())
        np.testing.assert_allclose(2.5 * (b.astype(np.float64) @ a).T, change, atol=1e-5)


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["LoraConfig.weights=('mamba',)"], "LoraConfig.weights is ('mamba',); expected weights that the model has"),
        (
            ["LoraConfig.weights=('dense', 'latent')"],
            "LoraConfig.weights is ('dense', 'latent'); expected weights that",
        ),
        (["LoraConfig.weights=('head',)"], "LoraConfig.weights is ('head',); expected some of"),
        (["LoraConfig.rank=0"], "LoraConfig.rank is 0; expected a number above 0"),
    ],
)
def test_adapters_that_cannot_be_are_refused(tmp_path, capsys, bindings, message):
    file = write_recipe(tmp_path)
    command = ["train", "--gin_file", str(file), "--checkpoint", "x", "--run", str(tmp_path / "run")]
    given = ["LoraConfig.rank=2"] if "rank" not in bindings[0] else []
    assert main([*command, *bound(*given, *bindings)]) == 2
    assert message in capsys.readouterr().err


def test_adapters_need_a_model_and_a_reward_models_head_is_trained(tmp_path, capsys):
    file = write_recipe(tmp_path)
    assert main(["train", "--gin_file", str(file), "--run", str(tmp_path), *bound("LoraConfig.rank=2")]) == 2
    assert "LoraConfig has bindings; expected --checkpoint, or --student" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="'score' among them"):
        config_of(hybrid(score_head=True))
    assert isinstance(config_of(hybrid(score_head=True), optimizer={"trained": ("score",)}), RunConfig)


def test_the_mask_keeps_what_is_frozen_among_adapters():
    config = config_of(optimizer={"frozen": ("mtp", "*")})
    chosen = trained_mask(build(config.model), config.optimizer)
    assert chosen is not None
    mask = leaves_of(chosen)
    trained = {path for path, leaf in mask.items() if leaf.get_value()}
    assert trained and all(is_factor(path) and path[0] == "backbone" for path in trained)
    assert not any("query" in path for path in trained if "query_up" not in path and "query_down" not in path)


@pytest.mark.parametrize(
    ("weights", "message"),
    [(("attention", "routed"), "expected none of routed_up, routed_down"), (("mamba",), "expected none of mamba_out")],
)
def test_what_peft_does_not_read_is_merged_instead(tmp_path, monkeypatch, weights, message):
    model = hybrid(pattern="M*E", mtp_depths=0)
    config = config_of(model, lora=LoraConfig(rank=2, weights=weights))
    monkeypatch.setattr(folders, "read_run_config", lambda folder: config)
    monkeypatch.setattr(adapters, "open_folder", RunFolder)
    with pytest.raises(ConfigError, match=message):
        adapters.write_peft(tmp_path, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


NEMOTRON = """
ModelConfig.pattern = 'M*E-M'
ModelConfig.vocab_size = 259
ModelConfig.hidden_size = 24
ModelConfig.num_attention_heads = 6
ModelConfig.num_key_value_heads = 2
ModelConfig.head_dim = 5
ModelConfig.intermediate_size = 14
ModelConfig.mamba_num_heads = 6
ModelConfig.mamba_head_dim = 5
ModelConfig.n_groups = 2
ModelConfig.ssm_state_size = 7
ModelConfig.chunk_size = 8
ModelConfig.n_routed_experts = 4
ModelConfig.num_experts_per_tok = 2
ModelConfig.moe_intermediate_size = 10
ModelConfig.moe_shared_expert_intermediate_size = 12
"""


@pytest.mark.peer
def test_peft_computes_with_the_adapters_what_we_compute(tmp_path):
    torch, peft, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
    file = write_recipe(tmp_path)
    text = file.read_text()
    file.write_text(NEMOTRON + text[text.index("DataConfig.corpus") :])
    base, run, _ = trained(tmp_path, file, "TrainConfig.steps=4")
    assert main(["convert", "to-hf", str(base), str(tmp_path / "hf"), "--dtype", "float32"]) == 0
    assert main(["convert", "to-peft", str(run), str(tmp_path / "peft")]) == 0
    ids = np.random.default_rng(0).integers(0, 259, (2, 13))
    np.save(tmp_path / "ids.npy", ids)
    model = without_clamp(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32))
    with torch.no_grad():
        plain = model(torch.from_numpy(ids)).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "peft")(torch.from_numpy(ids)).logits.numpy()
    out = tmp_path / "scores.npz"
    assert main(["score", "--checkpoint", str(run), "--tokens", str(tmp_path / "ids.npy"), "--out", str(out)]) == 0
    ours = np.load(out)["logits"]
    assert abs(plain - ours).max() > 1e-2 * abs(ours).max()
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * abs(ours).max())
