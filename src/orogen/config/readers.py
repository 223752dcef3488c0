"""The conditions under which each field of a config is read; `reads` checks runs against them."""

from collections.abc import Callable, Iterator

from orogen.config import readers_of_tasks as tasks
from orogen.config.kinds import LAYERS, Kind, either, reading
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.precision import PrecisionConfig
from orogen.config.readers_of_tasks import Reader
from orogen.config.recipe import FP8, layer_recipes
from orogen.config.run import RunConfig


def letters(model: ModelConfig) -> set[str]:
    """The letters of the model's layers, those of the multi-token-prediction block included."""
    return set(model.layers.main + model.layers.mtp)


def _by_letters(read_by: str, fields: str) -> Reader:
    otherwise = f"the model has no layers of {either(read_by)}"
    return Reader(fields, ("model",), lambda run: bool(set(read_by) & letters(run.model)), otherwise)


def _of_model(fields: str, holds: Callable[[ModelConfig], bool], otherwise: str) -> Reader:
    return Reader(fields, ("model",), lambda run: holds(run.model), otherwise)


def _of_plan(fields: str, holds: Callable[[PlanConfig], bool], otherwise: str) -> Reader:
    return Reader(fields, ("plan",), lambda run: holds(run.plan), otherwise)


def _of_precision(fields: str, holds: Callable[[PrecisionConfig], bool], otherwise: str) -> Reader:
    return Reader(fields, ("precision",), lambda run: holds(run.precision), otherwise)


def _of_kinds(of: Callable[[Kind], str]) -> Iterator[Reader]:
    """The fields that some kinds of layers read."""
    fields: dict[str, list[str]] = {}
    for field in dict.fromkeys(field for kind in LAYERS.values() for field in of(kind).split()):
        fields.setdefault(reading(field), []).append(field)
    yield from (_by_letters(read_by, " ".join(some)) for read_by, some in fields.items())


# By part, the fields that are always read; the configs themselves check the values.
ALWAYS = {
    **tasks.ALWAYS,
    "model": "pattern vocab_size hidden_size norm layer_norm_epsilon tie_word_embeddings learned_positions score_head",
    "plan": "data context tensor stage fsdp microbatches unroll remat offload offload_optimizer cross_entropy",
    "data": "corpus sources tokenizer vocab_size heldout_fraction tuning_fraction shuffle",
    "train": "steps batch_size sequence_length batch_ramp phases seed compute_dtype checkpoint_every "
    "checkpoint_minutes keep_checkpoints max_skipped_steps spike_deviations roll_back_after hang_minutes "
    "keep_program sample_prompts sample_tokens loggers",
    # With Muon, AdamW's beta1, beta2 and epsilon are those of the parameters that Muon leaves to it.
    "optimizer": "name learning_rate schedule warmup_steps beta1 beta2 epsilon weight_decay clip_norm moment_dtype "
    "trained frozen",
    "precision": "recipe keep switch_step",
}
# The other fields, by part. A field may have several readers, which must all hold. Those of the model depend on the
# model alone, since one model file serves many plans.
READERS: dict[str, tuple[Reader, ...]] = {
    **tasks.READERS,
    "model": (
        *_of_kinds(lambda kind: f"{kind.needs} {kind.reads}"),
        _of_model(
            "partial_rotary_factor rope_interleave yarn_factor yarn_original_positions yarn_beta_fast yarn_beta_slow "
            "yarn_mscale yarn_mscale_all_dim yarn_truncate",
            lambda model: model.rope_theta is not None,
            "ModelConfig.rope_theta is None",
        ),
        _of_model(
            "yarn_original_positions yarn_beta_fast yarn_beta_slow yarn_mscale yarn_mscale_all_dim yarn_truncate",
            lambda model: model.yarn_factor is not None,
            "ModelConfig.yarn_factor is None",
        ),
        _of_model(
            "yarn_mscale",
            lambda model: model.yarn_mscale_all_dim is not None,
            "ModelConfig.yarn_mscale_all_dim is None",
        ),
        _of_model(
            "yarn_mscale_all_dim",
            lambda model: model.yarn_mscale is not None or "+" in letters(model),
            "ModelConfig.yarn_mscale is None, and the model has no layers of multi-head latent attention (+)",
        ),
        _of_model("moe_bias", lambda model: model.mlp_bias, "ModelConfig.mlp_bias is False"),
        _of_model(
            "norm_topk_prob",
            lambda model: model.router_score != "softmax_topk",
            "weights of ModelConfig.router_score = 'softmax_topk' add up to one anyway",
        ),
        _of_model(
            "router_balance",
            lambda model: model.router_aux_loss_coef > 0,
            "ModelConfig.router_aux_loss_coef is 0: no balance loss",
        ),
        _of_model("topk_group", lambda model: model.n_group > 1, "ModelConfig.n_group is 1"),
        _of_model(
            "mtp_depths mtp_loss_scale", lambda model: bool(model.layers.mtp), "ModelConfig.pattern has no part after /"
        ),
    ),
    "plan": (
        *_of_kinds(lambda kind: kind.plan),
        _of_plan(
            "drop_policy", lambda plan: plan.capacity_factor is not None, "PlanConfig.capacity_factor is None: no drops"
        ),
        _of_plan("buffer_factor", lambda plan: plan.dispatch == "ragged", "PlanConfig.dispatch is not 'ragged'"),
        _of_plan("fsdp_size", lambda plan: plan.fsdp != "none", "PlanConfig.fsdp is 'none'"),
        _of_plan("context_attention context_ssm shift", lambda plan: plan.context > 1, "PlanConfig.context is 1"),
        _of_plan("stream", lambda plan: plan.tensor > 1, "PlanConfig.tensor is 1"),
        _of_plan("interleave", lambda plan: plan.stage == 1, "PlanConfig.stage is above 1"),
        _of_plan("interleave", lambda plan: plan.microbatches > 1, "PlanConfig.microbatches is 1"),
        _of_plan("schedule virtual", lambda plan: plan.stage > 1, "PlanConfig.stage is 1"),
        _of_plan(
            "logit_rows", lambda plan: plan.cross_entropy == "chunked", "PlanConfig.cross_entropy is not 'chunked'"
        ),
        _of_plan("quantize", lambda plan: plan.linear == "fp8", "PlanConfig.linear is not 'fp8'"),
        _of_model(
            "linear",
            lambda model: _has_dense_products(model),
            "no layer other than the first and the last, which never use FP8, has a dense product",
        ),
        _of_model(
            "rms_norm",
            lambda model: model.norm == "rms" or "M" in letters(model),
            f"ModelConfig.norm is not 'rms', and the model has no layers of {either('M')}",
        ),
    ),
    "data": (
        Reader(
            "text_field",
            ("data",),
            # Only the reader of a file or folder knows whether it has fields, and refuses the setting if it has none
            # (data/corpora.py).
            lambda run: {run.data.corpus, *(one.corpus for one in run.data.sources)} - {None, "stdlib"} != set(),
            "DataConfig.corpus is 'stdlib', plain text without fields",
        ),
        Reader(
            "record_dtype",
            ("data",),
            lambda run: run.data.corpus not in (None, "stdlib"),  # data/corpora.py looks for an ArrayRecord
            "DataConfig.corpus is 'stdlib' or None, without an ArrayRecord that `orogen tokenize` would read",
        ),
        Reader("text_field", ("chat",), lambda run: False, "ChatConfig: conversations have fields of their own"),
        Reader("text_field", ("preference",), lambda run: False, "PreferenceConfig: pairs have fields of their own"),
        Reader("text_field", ("vision",), lambda run: False, "VisionConfig: captions have a field of their own"),
        Reader(
            "seed",
            ("data",),
            lambda run: run.data.heldout_fraction > 0 or run.data.tuning_fraction > 0 or _draws_reasoning(run),
            "DataConfig.heldout_fraction and .tuning_fraction are 0: every document is trained on",
        ),
    ),
    "train": (
        Reader(
            "carry_states",
            ("model",),
            lambda run: bool(set("Mm") & set(run.model.layers.main)),
            f"the model has no layers of {either('Mm')} before /",
        ),
        Reader(
            "router_bias_update_rate",
            ("model",),
            lambda run: "E" in letters(run.model) and run.model.router_correction_bias,
            "the model has no routers (E) with ModelConfig.router_correction_bias",
        ),
        Reader(
            "spike_window",
            ("train",),
            lambda run: run.train.spike_deviations > 0,
            "TrainConfig.spike_deviations is 0: no loss is a spike",
        ),
        Reader(
            "repeat_bad_steps max_roll_backs",
            ("train",),
            lambda run: run.train.roll_back_after > 0,
            "TrainConfig.roll_back_after is 0: the run never goes back",
        ),
        Reader(
            "evaluate_every evaluate_rows ngram_order keep_best",
            ("data",),
            lambda run: run.data.heldout_fraction > 0,
            "DataConfig.heldout_fraction is 0: there is nothing to evaluate on",
        ),
    ),
    "optimizer": (
        Reader(
            "decay_steps",
            ("optimizer",),
            lambda run: run.optimizer.schedule == "wsd",
            "OptimizerConfig.schedule is not 'wsd'",
        ),
        Reader(
            "min_ratio",
            ("optimizer",),
            lambda run: run.optimizer.schedule != "constant",
            "OptimizerConfig.schedule is 'constant'",
        ),
    ),
    "precision": (
        _of_precision(
            "first_layers last_layers mtp expert_tokens health_every",
            lambda precision: precision.rounds,
            "no recipe of PrecisionConfig rounds operands",
        ),
        _of_precision(
            "switch_to switch_roles",
            lambda precision: precision.switch_step is not None,
            "PrecisionConfig.switch_step is None",
        ),
        _of_precision(
            "block",
            lambda precision: bool(precision.recipes - {"plain", "fp8_tensorwise"}),
            "no recipe of PrecisionConfig has blocks",
        ),
        _of_precision(
            "weight_blocks hadamard hadamard_roles stochastic four_over_six",
            lambda precision: "nvfp4" in precision.recipes,
            "no recipe of PrecisionConfig is 'nvfp4'",
        ),
        _of_precision("hadamard_roles", lambda precision: precision.hadamard > 0, "PrecisionConfig.hadamard is 0"),
        _of_model("mtp", lambda model: bool(model.layers.mtp), "ModelConfig.pattern has no part after /"),
        _by_letters("E", "expert_tokens"),
    ),
}


def _draws_reasoning(run: RunConfig) -> bool:
    return run.chat is not None and (run.chat.without_reasoning > 0 or run.chat.truncated > 0)


def _has_dense_products(model: ModelConfig) -> bool:
    """Whether a layer that may use FP8 has a product with a weight matrix other than a routed expert's."""
    recipes = layer_recipes(PlanConfig(linear=FP8), model)
    pattern = model.layers.main + model.layers.mtp
    inner = {letter for letter, recipe in zip(pattern, recipes, strict=True) if FP8 in recipe.linear.names()}
    beside_experts = model.moe_latent_size or model.moe_shared_expert_intermediate_size
    return bool(inner - {"E"}) or ("E" in inner and beside_experts is not None)
