"""How a plan splits a model's layers over the stages of a pipeline; no jax."""

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.cost.flops import head_flops_per_token, layer_flops_per_token
from orogen.parallel.schedule import chunks_per_stage, segments

# Sequence length for which stages are balanced if no batch gives it.
TYPICAL_LENGTH = 4096


def stage_patterns(model: ModelConfig, config: PlanConfig, length: int = TYPICAL_LENGTH) -> tuple[str, ...]:
    """The layers of each segment, of which stage s has the segments s, s + stages, …; if the pattern has no |, segments
    take about equally many FLOPs for sequences of `length` tokens. Raises ConfigError as `chunks_per_stage` does."""
    return segments(
        model.layers,
        config.stage * chunks_per_stage(config, model),
        lambda letter: layer_flops_per_token(letter, model, length),
        last=head_flops_per_token(model, length),
    )
