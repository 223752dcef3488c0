"""Settings that nothing reads are refused by name; each field's condition is tested on both sides of its boundary."""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.helpers import HYBRID

from orogen.config.checks import ConfigError
from orogen.config.kinds import LAYERS
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.readers import ALWAYS, READERS
from orogen.config.reads import plain_model, require_read, unread, without_unread
from orogen.config.rl import EnvironmentConfig
from orogen.config.run import PARTS, OptimizerConfig, RunConfig, TrainConfig
from orogen.layers.documents import documents
from orogen.model.lm import LanguageModel, build
from orogen.parallel.plan import single_device_plan
from orogen.train.optimizer import make_optimizer

# Enough for every letter.
SIZES: dict[str, Any] = {
    **HYBRID,
    "mtp_depths": 0,
    "sliding_window": 4,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
    "rope_theta": 1e4,
    "mamba_intermediate_size": 10,
    "time_step_rank": 3,
    "image_feature_size": 5,
    "image_features": 3,
    "resampler_latents": 2,
    "resampler_layers": 1,
}
PARTS_OF: dict[str, dict[str, Any]] = {
    "plan": {},
    "data": {"corpus": "stdlib", "tokenizer": "byte"},
    "train": {"steps": 10, "batch_size": 4, "sequence_length": 24, "seed": 3},
    "optimizer": {"learning_rate": 1e-3},
    "evaluate": {"tasks": ("mqar", "needle", "hellaswag"), "texts": ("a.txt",)},
    "precision": {},
    "distill": {"divergence": 1.0},
    "rl": {"environments": (EnvironmentConfig(name="a", kind="workplace"),), "prompts": 2, "samples": 2,
           "max_tokens": 4, "template": "plain"},
}  # fmt: skip
VISION = {"encoder": "clip", "features": "kept", "images_per_row": 3}
OF_TASKS = {
    "preference": {"template": "x"},
    "vision": VISION,
    "elastic": {"budgets": (0.5, 1.0), "hidden_size": (2,)},
}  # parts that only some tasks have


def a_run(pattern: str = "M", **bound: Any) -> RunConfig:
    """A run of a model with the pattern, without unread settings, and with the fields `bound` as part__field."""
    model = {k: v for k, v in SIZES.items() if k not in ("router_aux_loss_coef", "router_z_loss_coef")}
    parts = {"model": dataclasses.asdict(plain_model(ModelConfig(**{**model, "pattern": pattern}))), **PARTS_OF}
    parts = {part: dict(fields) for part, fields in parts.items()}
    for name, value in bound.items():
        part, field = name.split("__")
        parts.setdefault(part, dict(OF_TASKS.get(part, {})))[field] = value
    return RunConfig(**{part: PARTS[part](**fields) for part, fields in parts.items()})


# (field, value, settings of a run that reads it, settings of one that does not, why it does not)
NO = "the model has no layers of "
ATTENTION = NO + "attention (*) or sliding-window attention (w) or multi-head latent attention (+)"
HEADS = NO + "attention (*) or sliding-window attention (w)"
SEEING, CROSS = " or gated cross-attention (x)", NO + "gated cross-attention (x)"
TANH = NO + "dense MLP (-) or mixture of experts (E) or tanh-gated MLP (g)"
MAMBAS, EXPERTS = NO + "Mamba-2 (M) or Mamba-1 (m)", NO + "mixture of experts (E)"
NO_ROPE, NO_YARN = {"pattern": "*", "model__rope_theta": None}, {"pattern": "*"}
YARN = {"pattern": "*", "model__yarn_factor": 4.0, "model__yarn_original_positions": 64}
FEW = "the model has no routers (E) with ModelConfig.router_correction_bias"
NO_HELDOUT = {"data__heldout_fraction": 0.0}
MXFP8 = {"precision__recipe": "mxfp8"}
BORDERS: list[tuple[str, Any, dict, dict, str]] = [
    *((f"model__{f}", v, {"pattern": p}, {"pattern": "ME-"}, ATTENTION)
      for f, v, p in (("attention_bias", "all", "+"), ("rope_theta", 10.0, "w"))),
    *(("model__num_attention_heads", 2, {"pattern": p}, {"pattern": "ME-"}, ATTENTION + SEEING) for p in "*x"),
    *((f"model__{f}", 4, {"pattern": "x"}, {"pattern": "g*"}, CROSS) for f in (
        "image_feature_size", "image_features", "resampler_latents", "resampler_layers")),
    *((f"model__{f}", 4, {"pattern": "x", f"model__{g}": 2}, {"pattern": "g*", f"model__{g}": 2}, CROSS) for f, g in (
        ("retrieved_captions", "caption_tokens"), ("caption_tokens", "retrieved_captions"))),
    *((f"model__{f}", v, {"pattern": "*"}, {"pattern": "+M"}, HEADS + SEEING)
      for f, v in (("num_key_value_heads", 3), ("head_dim", 2))),
    *((f"model__{f}", True, {"pattern": "w"}, {"pattern": "M"}, HEADS) for f in ("qk_norm", "attention_sinks")),
    ("model__sliding_window", 3, {"pattern": "M/w"}, {"pattern": "*"}, NO + "sliding-window attention (w)"),
    *((f"model__{f}", v, {"pattern": "*"}, NO_ROPE, "ModelConfig.rope_theta is None")
      for f, v in (("partial_rotary_factor", 0.5), ("rope_interleave", True))),
    *((f"model__{f}", v, YARN, NO_YARN, "ModelConfig.yarn_factor is None") for f, v in (
        ("yarn_original_positions", 32), ("yarn_beta_fast", 16.0), ("yarn_beta_slow", 2.0), ("yarn_truncate", False))),
    ("model__yarn_factor", 4.0, {"pattern": "*", "model__yarn_original_positions": 64}, {"pattern": "M"}, ATTENTION),
    ("model__yarn_mscale", 2.0, {**YARN, "model__yarn_mscale_all_dim": 1.0}, YARN,
     "ModelConfig.yarn_mscale_all_dim is None"),
    ("model__yarn_mscale_all_dim", 2.0, {**YARN, "pattern": "+"}, YARN,
     "ModelConfig.yarn_mscale is None, and the model has no layers of multi-head latent attention (+)"),
    *((f"model__{f}", 8, {"pattern": "+"}, {"pattern": "*"}, NO + "multi-head latent attention (+)") for f in (
        "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
    *(("model__intermediate_size", 8, {"pattern": p}, {"pattern": "E"}, NO + "dense MLP (-) or tanh-gated MLP (g)")
      for p in "-g"),
    *((f"model__{f}", v, {"pattern": "E", "model__mlp_gated": True, **more}, {"pattern": "M*"},
       NO + "dense MLP (-) or mixture of experts (E)" + SEEING + " or tanh-gated MLP (g)")
      for f, v, more in (("mlp_hidden_act", "silu", {}), ("mlp_gated", True, {}),
                         ("swiglu_limit", 7.0, {"model__mlp_hidden_act": "silu"}))),
    ("model__mlp_bias", True, {"pattern": "E"}, {"pattern": "xM*"}, TANH),
    *(("vision__guard", 0.5, {f"vision__{f}": 1 for f in read} | more, {"vision__images_per_row": 2},
       "VisionConfig.retrieved and .shots are 0: nothing is retrieved")
      for read, more in ((("shots",), {}), (("retrieved",), {"vision__database": "captions"}))),
    *((f"model__{f}", v, {"pattern": "M"}, {"pattern": "m*"}, NO + "Mamba-2 (M)") for f, v in (
        ("mamba_num_heads", 4), ("mamba_head_dim", 2), ("n_groups", 4), ("chunk_size", 4), ("mamba_norm_groups", 4),
        ("time_step_min", 1e-3), ("time_step_max", 1e-1))),
    *((f"model__{f}", 4, {"pattern": "m"}, {"pattern": "M"}, NO + "Mamba-1 (m)")
      for f in ("mamba_intermediate_size", "time_step_rank")),
    *((f"model__{f}", v, {"pattern": p}, {"pattern": "*-E"}, MAMBAS) for p in "Mm" for f, v in (
        ("ssm_state_size", 4), ("conv_kernel", 3), ("use_conv_bias", False), ("mamba_proj_bias", True))),
    *((f"model__{f}", v, {"pattern": "E"}, {"pattern": "-M"}, EXPERTS) for f, v in (
        ("n_routed_experts", 12), ("num_experts_per_tok", 2), ("moe_intermediate_size", 8),
        ("moe_shared_expert_intermediate_size", 8), ("moe_shared_expert_gate", True), ("moe_latent_size", 8),
        ("router_score", "softmax"), ("router_bias", True), ("router_correction_bias", False),
        ("norm_topk_prob", False), ("routed_scaling_factor", 3.0),
        ("n_group", 4), ("router_aux_loss_coef", 0.1), ("router_z_loss_coef", 0.1),
        ("router_balance", "global"))),
    ("model__norm_topk_prob", False, {"pattern": "E", "model__router_score": "softmax"},
     {"pattern": "E", "model__router_score": "softmax_topk"},
     "weights of ModelConfig.router_score = 'softmax_topk' add up to one anyway"),
    ("model__moe_bias", "shared", {"pattern": "E", "model__mlp_bias": True}, {"pattern": "E"},
     "ModelConfig.mlp_bias is False"),
    ("model__router_balance", "global", {"pattern": "E"}, {"pattern": "E", "model__router_aux_loss_coef": 0.0},
     "ModelConfig.router_aux_loss_coef is 0: no balance loss"),
    ("model__topk_group", 2, {"pattern": "E", "model__n_group": 4}, {"pattern": "M"}, EXPERTS),
    ("model__mtp_loss_scale", 0.1, {"pattern": "M/M"}, {"pattern": "MM"}, "ModelConfig.pattern has no part after /"),
    *((f"plan__{f}", v, {"pattern": "*E", **more}, {"pattern": "*-", **more}, EXPERTS) for f, v, more in (
        ("expert", 2, {}), ("expert_tensor", 2, {}), ("dispatch", "alltoall", {}), ("capacity_factor", 1.5, {}),
        ("drop_policy", "probs", {"plan__capacity_factor": 1.5}), ("buffer_factor", 2.0, {"plan__dispatch": "ragged"}),
        ("grouped_matmul", "ragged_dot", {}), ("permutation", "triton", {}))),
    ("plan__drop_policy", "probs", {"pattern": "E", "plan__capacity_factor": 1.5}, {"pattern": "E"},
     "PlanConfig.capacity_factor is None: no drops"),
    ("plan__attention", "blocked", {"pattern": "M/+"}, {"pattern": "M-"}, ATTENTION),
    ("plan__ssd", "recurrence", {"pattern": "M"}, {"pattern": "m"}, NO + "Mamba-2 (M)"),
    ("plan__selective_scan", "reference", {"pattern": "m"}, {"pattern": "M"}, NO + "Mamba-1 (m)"),
    ("plan__causal_conv1d", "triton", {"pattern": "m"}, {"pattern": "*"}, MAMBAS),
    ("plan__context_attention", "alltoall", {"pattern": "w", "plan__context": 2}, {"pattern": "M", "plan__context": 2},
     ATTENTION),
    ("plan__context_ssm", "heads", {"pattern": "M", "plan__context": 2}, {"pattern": "*", "plan__context": 2}, MAMBAS),
    *((f"plan__{f}", v, {"pattern": "M*", "plan__context": 2}, {"pattern": "M*"}, "PlanConfig.context is 1")
      for f, v in (("context_attention", "allgather"), ("context_ssm", "heads"), ("shift", "alltoall"))),
    *((f"plan__{f}", v, {"plan__stage": 2, "plan__schedule": "interleaved"}, {}, "PlanConfig.stage is 1")
      for f, v in (("schedule", "gpipe"), ("virtual", 1))),
    ("plan__interleave", 2, {"plan__microbatches": 2}, {"plan__microbatches": 2, "plan__stage": 2},
     "PlanConfig.stage is above 1"),
    ("plan__interleave", 2, {"plan__microbatches": 2}, {}, "PlanConfig.microbatches is 1"),
    ("plan__stream", "whole", {"plan__tensor": 2}, {}, "PlanConfig.tensor is 1"),
    ("plan__logit_rows", 8, {}, {"plan__cross_entropy": "full"}, "PlanConfig.cross_entropy is not 'chunked'"),
    ("plan__quantize", "triton", {"pattern": "M-M", "plan__linear": "fp8"}, {}, "PlanConfig.linear is not 'fp8'"),
    ("plan__linear", "fp8", {"pattern": "M-M"}, {"pattern": "M-/-"},
     "no layer other than the first and the last, which never use FP8, has a dense product"),
    ("plan__rms_norm", "triton", {"model__norm": "layer"}, {"pattern": "*", "model__norm": "layer"},
     "ModelConfig.norm is not 'rms', and the model has no layers of Mamba-2 (M)"),
    ("plan__fsdp_size", 2, {"plan__fsdp": "optimizer"}, {}, "PlanConfig.fsdp is 'none'"),
    ("plan__buffer_factor", 2.0, {"pattern": "E", "plan__dispatch": "ragged"}, {"pattern": "E"},
     "PlanConfig.dispatch is not 'ragged'"),
    ("data__text_field", "body", {"data__corpus": "a.jsonl"}, {"data__corpus": "stdlib"},
     "DataConfig.corpus is 'stdlib', plain text without fields"),
    ("data__record_dtype", "int32", {"data__corpus": "a.array_record"}, {"data__corpus": "stdlib"},
     "DataConfig.corpus is 'stdlib' or None, without an ArrayRecord that `orogen tokenize` would read"),
    ("data__seed", 3, {**NO_HELDOUT, "data__tuning_fraction": 0.1}, {**NO_HELDOUT, "data__tuning_fraction": 0.0},
     "DataConfig.heldout_fraction and .tuning_fraction are 0: every document is trained on"),
    *(("train__carry_states", True, {"pattern": letter}, {"pattern": "*/M", "model__mtp_depths": 1},
       "the model has no layers of Mamba-2 (M) or Mamba-1 (m) before /") for letter in "Mm"),
    ("train__router_bias_update_rate", 0.1, {"pattern": "E"}, {"pattern": "M"}, FEW),
    ("train__router_bias_update_rate", 0.1, {"pattern": "E"}, {"pattern": "E", "model__router_correction_bias": False},
     FEW),
    *((f"train__{f}", 3, {}, NO_HELDOUT, "DataConfig.heldout_fraction is 0: there is nothing to evaluate on")
      for f in ("evaluate_every", "evaluate_rows", "ngram_order")),
    ("train__keep_best", True, {}, NO_HELDOUT, "DataConfig.heldout_fraction is 0: there is nothing to evaluate on"),
    ("train__spike_window", 9, {"train__spike_deviations": 8.0}, {},
     "TrainConfig.spike_deviations is 0: no loss is a spike"),
    *((f"train__{f}", v, {"train__roll_back_after": 1}, {}, "TrainConfig.roll_back_after is 0: the run never goes back")
      for f, v in (("repeat_bad_steps", True), ("max_roll_backs", 5))),
    *(("optimizer__decay_steps", 3, {"optimizer__schedule": "wsd"}, {"optimizer__schedule": s},
       "OptimizerConfig.schedule is not 'wsd'") for s in ("cosine", "constant")),
    ("optimizer__min_ratio", 0.2, {"optimizer__schedule": "wsd", "optimizer__decay_steps": 3},
     {"optimizer__schedule": "constant"}, "OptimizerConfig.schedule is 'constant'"),
    *((f"preference__{f}", v, {"preference__sft_weight": 1.0}, {"preference__loss": "bradley_terry"},
       "PreferenceConfig.loss is 'bradley_terry'")
      for f, v in (("beta", 0.5), ("average_log_probs", True), ("preference_weight", 2.0), ("sft_weight", 0.5),
                   ("sft_average_log_probs", True))),
    ("preference__label_smoothing", 0.1, {}, {"preference__loss": "ipo"}, "PreferenceConfig.loss is not 'dpo'"),
    ("preference__sft_average_log_probs", True, {"preference__sft_weight": 1.0}, {"preference__beta": 0.5},
     "PreferenceConfig.sft_weight is 0"),
    ("preference__center_weight", 0.1, {"preference__loss": "bradley_terry"}, {"preference__beta": 0.5},
     "PreferenceConfig.loss is not 'bradley_terry'"),
    *((f"evaluate__{f}", v, {}, {"evaluate__tasks": ("hellaswag",)}, "EvaluateConfig.tasks has no generated suite")
      for f, v in (("lengths", (64,)), ("samples", 9), ("seed", 3))),
    ("evaluate__haystack", "a.txt", {}, {"evaluate__tasks": ("mqar", "hellaswag")},
     "EvaluateConfig.tasks has no 'needle'"),
    *((f"evaluate__{f}", 2, {"evaluate__tasks": ("mqar",), "evaluate__task_path": ("tasks",)},
       {"evaluate__tasks": ("mqar",)}, "EvaluateConfig.tasks has no task of lm-eval") for f in ("limit", "shots")),
    ("evaluate__limit", 2, {}, {"evaluate__tasks": ("mqar",)}, "EvaluateConfig.tasks has no task of lm-eval"),
    ("evaluate__task_path", ("tasks",), {}, {"evaluate__tasks": ()}, "EvaluateConfig.tasks is empty"),
    *((f"evaluate__{f}", v, {}, {"evaluate__texts": ()}, "EvaluateConfig.texts is empty")
      for f, v in (("text_field", "body"), ("method", "carried"), ("score_ends", True))),
    *(("evaluate__stride", 9, {}, other, "EvaluateConfig has no texts to read by method 'windows'")
      for other in ({"evaluate__texts": ()}, {"evaluate__method": "carried"})),
    *((f"precision__{f}", v, {"pattern": "M-E", **MXFP8}, {"pattern": "M-E"},
       "no recipe of PrecisionConfig rounds operands")
      for f, v in (("first_layers", 1), ("last_layers", 1), ("expert_tokens", 8), ("health_every", 5))),
    ("precision__mtp", True, {"pattern": "M/-", "model__mtp_depths": 1, **MXFP8}, MXFP8,
     "ModelConfig.pattern has no part after /"),
    ("precision__expert_tokens", 8, {"pattern": "E", **MXFP8}, {"pattern": "M", **MXFP8}, EXPERTS),
    *((f"precision__{f}", v, {**MXFP8, "precision__switch_step": 5}, MXFP8, "PrecisionConfig.switch_step is None")
      for f, v in (("switch_to", "fp8_tensorwise"), ("switch_roles", "forward"))),
    ("precision__block", 4, MXFP8, {"precision__recipe": "fp8_tensorwise"}, "no recipe of PrecisionConfig has blocks"),
    *((f"precision__{f}", v, {"precision__recipe": "nvfp4"}, MXFP8, "no recipe of PrecisionConfig is 'nvfp4'")
      for f, v in (("weight_blocks", "rows"), ("hadamard", 4), ("hadamard_roles", ("forward",)), ("stochastic", ()),
                   ("four_over_six", "all"))),
    *((f"rl__{f}", v, {}, {"rl__importance": "none"}, "RLConfig.importance is 'none'")
      for f, v in (("importance_low", 0.1), ("importance_high", 9.0))),
    ("rl__kl_estimator", "k2", {"rl__kl": 0.1}, {}, "RLConfig.kl is 0"),
    ("rl__overlong_buffer", 2, {"rl__overlong": "penalty"}, {}, "RLConfig.overlong is not 'penalty'"),
    ("rl__overlong_penalty", 0.5, {"rl__overlong": "penalty", "rl__overlong_buffer": 2}, {},
     "RLConfig.overlong is not 'penalty'"),
    *((f"rl__{f}", v, {"rl__curriculum": "gaussian"}, {}, "RLConfig.curriculum is 'none'") for f, v in (
        ("profile_samples", 8), ("profile_every", 5), ("curriculum_start", 0.5), ("curriculum_end", 0.5),
        ("curriculum_width", 0.5))),
    *((f"rl__{f}", v, {"rl__server": "http://a:1", "rl__server_weights": "."}, {},
       "RLConfig.server is None: no request is sent")
      for f, v in (("server_timeout", 5.0), ("server_deadline", 900.0), ("server_retries", 2))),
    ("precision__hadamard_roles", ("forward",), {"precision__recipe": "nvfp4"},
     {"precision__recipe": "nvfp4", "precision__hadamard": 0}, "PrecisionConfig.hadamard is 0"),
    *(("distill__rest", "bucket", reading, {}, "DistillConfig.top_k and .logits are None: no token is left out")
      for reading in ({"distill__top_k": 4}, {"distill__logits": "folder"})),
    ("elastic__context", 9, {"elastic__cost": "gib"}, {"elastic__cost": "active"}, "ElasticConfig.cost is not 'gib'"),
    *((f"distill__{f}", v, {"distill__states": ("1:2",)}, {},
       "DistillConfig.states is (): no hidden states are compared")
      for f, v in (("state_loss", "mse"), ("state_weight", 0.5), ("state_channels", "folder"))),
    ("distill__teacher_plan", PlanConfig(), {}, {"distill__logits": "folder"},
     "DistillConfig.logits is set: the teacher does not run"),
]  # fmt: skip
# Where nothing reads these, their config itself refuses them.
REFUSED_BEFORE = (
    "plan__fsdp_size",
    "plan__buffer_factor",
    "model__topk_group",
    "model__mtp_depths",
    "rl__overlong_buffer",
)


@pytest.mark.parametrize(("name", "value", "reading", "idle", "why"), BORDERS)
def test_a_setting_is_refused_only_if_nothing_reads_it(name, value, reading, idle, why):
    part, field = name.split("__")
    default = PARTS[part].__dataclass_fields__[field].default
    assert value != default
    require_read(a_run(**{**reading, name: value}))
    try:
        run = a_run(**{**idle, name: value})
    except ConfigError:
        assert name in REFUSED_BEFORE
        return
    alone = [setting for setting in unread(run) if setting.field == field]
    assert [(s.name, s.value, s.default, s.otherwise) for s in alone] == [
        (f"{PARTS[part].__name__}.{field}", value, default, why)
    ]
    with pytest.raises(ConfigError) as caught:
        require_read(run)
    assert f"{PARTS[part].__name__}.{field} is {value!r}" in str(caught.value) and why in str(caught.value)
    assert getattr(getattr(without_unread(run), part), field) == default


@pytest.mark.parametrize("part", PARTS)
def test_every_field_is_read_always_or_conditionally(part):
    always = ALWAYS[part].split()
    conditional = {field for reader in READERS[part] for field in reader.fields.split()}
    assert not conditional & set(always) and len(always) == len(set(always))
    assert conditional | set(always) == {field.name for field in dataclasses.fields(PARTS[part])}
    tried = {name.removeprefix(f"{part}__") for name, *_ in BORDERS if name.startswith(f"{part}__")}
    assert conditional - tried <= {"mtp_depths"}


def recording(config: Any) -> tuple[Any, set[str]]:
    """A copy of `config`, and a set that collects the fields that are read of it, other than by copies and checks."""
    fields, read = {field.name for field in dataclasses.fields(config)}, set()

    class Recorder(type(config)):
        __hash__, __eq__ = object.__hash__, object.__eq__

        def __getattribute__(self, name: str) -> Any:
            if name in fields and sys._getframe(1).f_globals["__name__"] not in ("dataclasses", "orogen.config.checks"):
                read.add(name)
            return object.__getattribute__(self, name)

    recorder = Recorder(**{field: getattr(config, field) for field in fields})
    read.clear()
    return recorder, read


# Read by the losses alone; and read without effect, since they are neutral if the table says that nothing reads them.
OF_LOSSES = {"mtp_loss_scale", "router_aux_loss_coef", "router_z_loss_coef"}
WITHOUT_EFFECT = {"mtp_depths", "topk_group", "yarn_factor"}
HELD_TO_THE_DEFAULT = {"partial_rotary_factor"}  # by the config itself, where latent attention would not read it
KERNELS = {"attention", "ssd", "selective_scan", "causal_conv1d", "grouped_matmul", "permutation"}


def declared_as_read(run: RunConfig, part: str) -> set[str]:
    idle = {f for reader in READERS[part] if not reader.holds(run) for f in reader.fields.split()}
    return {field.name for field in dataclasses.fields(PARTS[part])} - idle


@pytest.mark.parametrize("letter", LAYERS)
def test_a_forward_pass_reads_the_fields_that_are_declared_as_read(letter):
    run = a_run(letter, **({"model__rope_theta": 10.0} if letter in "*w+" else {}))
    (model, of_model), (sizes, of_plan) = recording(run.model), recording(run.plan)
    plan = dataclasses.replace(single_device_plan(run.plan, run.model), config=sizes)
    tokens_bt = jnp.zeros((2, 6), jnp.int32)

    def forward():
        return LanguageModel(model, nnx.Rngs(0)).logits(tokens_bt, documents(tokens_bt + 1), plan)

    jax.eval_shape(forward)
    elsewhere = OF_LOSSES | WITHOUT_EFFECT | (HELD_TO_THE_DEFAULT if letter == "+" else set())
    assert of_model - elsewhere == declared_as_read(run, "model") - elsewhere
    assert of_plan & KERNELS == declared_as_read(run, "plan") & KERNELS


def test_muon_leaves_parameters_to_adamw_which_reads_its_own_settings():
    """So these settings are read: the embedding's update depends on them, a matrix's does not."""
    built = build(a_run("-").model)
    params = jax.tree.map(lambda x: jnp.linspace(0.1, 1, x.size).reshape(x.shape), built.params)

    def second_updates(**changes):
        config = OptimizerConfig(name="muon", learning_rate=1e-2, schedule="constant", **changes)
        optimizer = make_optimizer(config, 10, built.params)
        updates, state = optimizer.update(params, optimizer.init(params), params, grad_norm=jnp.float32(1))
        smaller = jax.tree.map(lambda x: 0.3 * x, params)
        updates, _ = optimizer.update(smaller, state, params, grad_norm=jnp.float32(1))
        found = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(updates)}
        return [next(x for path, x in found.items() if name in path) for name in ("embedding", "up")]

    changes = ({}, {"beta1": 0.5}, {"beta2": 0.5}, {"epsilon": 0.5})
    (embedding, matrix), *others = jax.device_get(jax.jit(lambda: [second_updates(**c) for c in changes])())
    for other_embedding, other_matrix in others:
        assert not np.allclose(embedding, other_embedding, rtol=1e-3)
        np.testing.assert_allclose(matrix, other_matrix, rtol=1e-6)


def test_warm_up_ends_within_the_run():
    a_run(optimizer__warmup_steps=10).check()
    with pytest.raises(ConfigError) as caught:
        a_run(optimizer__warmup_steps=11).check()
    expected = "at most TrainConfig.steps = 10: the rate would not reach its peak"
    assert str(caught.value) == f"OptimizerConfig.warmup_steps is 11; expected {expected}"


def test_a_missing_part_refuses_nothing():
    """A plan file alone may be for any model."""
    require_read(RunConfig(plan=PlanConfig(expert=2, dispatch="alltoall")))
    require_read(RunConfig(plan=PlanConfig(), train=TrainConfig(**PARTS_OF["train"], ngram_order=3)))


def test_several_settings_are_named_in_one_line():
    with pytest.raises(ConfigError) as caught:
        require_read(a_run(plan__expert=2, plan__dispatch="alltoall", optimizer__decay_steps=3))
    assert str(caught.value) == (
        "OptimizerConfig.decay_steps is 3; expected 0, since nothing reads it: OptimizerConfig.schedule is not 'wsd'; "
        "PlanConfig.expert is 2, PlanConfig.dispatch is 'alltoall'; expected 1, 'allgather', since nothing reads them: "
        "the model has no layers of mixture of experts (E)"
    )
