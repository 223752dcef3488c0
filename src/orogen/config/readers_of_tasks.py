"""The conditions of `readers` for the parts of a config that only some tasks have."""

from collections.abc import Callable
from typing import NamedTuple

from orogen.config.preference import BRADLEY_TERRY, DPO, PreferenceConfig
from orogen.config.rl import RLConfig
from orogen.config.run import RunConfig


class Reader(NamedTuple):
    """Fields that are read only if `holds`. needs: the parts of the run that `holds` looks at; if one is missing, the
    fields are not checked. otherwise: why a run does not read them if `holds` is False."""

    fields: str
    needs: tuple[str, ...]
    holds: Callable[[RunConfig], bool]
    otherwise: str


def _of_rl(fields: str, holds: Callable[[RLConfig], bool], otherwise: str) -> Reader:
    return Reader(fields, ("rl",), lambda run: holds(run.rl), otherwise)


def _of_preference(fields: str, holds: Callable[[PreferenceConfig], bool], otherwise: str) -> Reader:
    return Reader(fields, ("preference",), lambda run: holds(run.preference), otherwise)


ALWAYS = {
    "chat": "template too_long without_reasoning truncated learned",
    "distill": "divergence cross_entropy temperature top_k logits states",
    "elastic": "budgets cost hidden_size intermediate_size num_attention_heads mamba_num_heads mamba_head_dim "
    "n_routed_experts moe_intermediate_size moe_shared_expert_intermediate_size moe_latent_size num_layers removal "
    "weights later_weights later_after budget_weight tolerance router_learning_rate temperature temperature_decay "
    "sharpness",
    "preference": "template too_long loss",
    "evaluate": "tasks every texts max_length batch_tokens",
    "rl": "environments prompts samples max_tokens template temperature algorithm clip_low clip_high dual_clip mean "
    "importance sequence_error baseline normalise advantage_clip overlong resample kl length_control concise_bonus "
    "curriculum updates exact slots workers table_rows staleness router_replay server server_weights",
    "lora": "rank alpha weights",
    "vision": "encoder features images_per_row image_token database retrieved retrieval shots",
}
READERS: dict[str, tuple[Reader, ...]] = {
    "chat": (),
    "lora": (),
    "distill": (
        Reader(
            "rest",
            ("distill",),
            lambda run: run.distill.top_k is not None or run.distill.logits is not None,
            "DistillConfig.top_k and .logits are None: no token is left out",
        ),
        Reader(
            "state_loss state_weight state_channels",
            ("distill",),
            lambda run: bool(run.distill.states),
            "DistillConfig.states is (): no hidden states are compared",
        ),
        Reader(
            "teacher_plan",
            ("distill",),
            lambda run: run.distill.logits is None,
            "DistillConfig.logits is set: the teacher does not run",
        ),
    ),
    "elastic": (
        Reader("context", ("elastic",), lambda run: run.elastic.cost == "gib", "ElasticConfig.cost is not 'gib'"),
    ),
    "preference": (
        _of_preference(
            "beta average_log_probs preference_weight sft_weight sft_average_log_probs",
            lambda preference: preference.loss != BRADLEY_TERRY,
            "PreferenceConfig.loss is 'bradley_terry'",
        ),
        _of_preference(
            "label_smoothing", lambda preference: preference.loss == DPO, "PreferenceConfig.loss is not 'dpo'"
        ),
        _of_preference(
            "sft_average_log_probs", lambda preference: preference.sft_weight > 0, "PreferenceConfig.sft_weight is 0"
        ),
        _of_preference(
            "center_weight",
            lambda preference: preference.loss == BRADLEY_TERRY,
            "PreferenceConfig.loss is not 'bradley_terry'",
        ),
    ),
    "evaluate": (
        Reader(
            "lengths samples seed",
            ("evaluate",),
            lambda run: bool(run.evaluate.generated),
            "EvaluateConfig.tasks has no generated suite",
        ),
        Reader(
            "haystack",
            ("evaluate",),
            lambda run: "needle" in run.evaluate.tasks,
            "EvaluateConfig.tasks has no 'needle'",
        ),
        Reader(
            "limit shots",
            ("evaluate",),
            lambda run: run.evaluate.generated != run.evaluate.tasks or bool(run.evaluate.task_path),
            "EvaluateConfig.tasks has no task of lm-eval",
        ),
        Reader("task_path", ("evaluate",), lambda run: bool(run.evaluate.tasks), "EvaluateConfig.tasks is empty"),
        Reader(
            "text_field method score_ends",
            ("evaluate",),
            lambda run: bool(run.evaluate.texts),
            "EvaluateConfig.texts is empty",
        ),
        Reader(
            "stride",
            ("evaluate",),
            lambda run: bool(run.evaluate.texts) and run.evaluate.method == "windows",
            "EvaluateConfig has no texts to read by method 'windows'",
        ),
    ),
    "rl": (
        _of_rl("importance_low importance_high", lambda rl: rl.importance != "none", "RLConfig.importance is 'none'"),
        _of_rl("kl_estimator", lambda rl: rl.kl > 0, "RLConfig.kl is 0"),
        _of_rl(
            "overlong_buffer overlong_penalty",
            lambda rl: rl.chosen("overlong") == "penalty",
            "RLConfig.overlong is not 'penalty'",
        ),
        _of_rl(
            "profile_samples profile_every curriculum_start curriculum_end curriculum_width",
            lambda rl: rl.curriculum != "none",
            "RLConfig.curriculum is 'none'",
        ),
        _of_rl(
            "server_timeout server_deadline server_retries",
            lambda rl: rl.server is not None,
            "RLConfig.server is None: no request is sent",
        ),
    ),
    "vision": (
        Reader(
            "guard",
            ("vision",),
            lambda run: run.vision.retrieved > 0 or run.vision.shots > 0,
            "VisionConfig.retrieved and .shots are 0: nothing is retrieved",
        ),
    ),
}
