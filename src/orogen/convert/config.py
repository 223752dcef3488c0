"""A Hugging Face config.json as a ModelConfig, and back, for each family of `names`.

Fields with an effect that we do not implement are refused; fields without effect are ignored, and kept for the export.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.reads import layers_read, plain_model
from orogen.convert.defaults import NULLS
from orogen.convert.fields import Fields
from orogen.convert.forms import FORMS
from orogen.convert.quantization import read_quantization

# Fields on which a model's outputs do not depend: settings of training and of computation.
FREE = (
    "router_aux_loss_coef", "router_balance", "router_z_loss_coef", "mtp_loss_scale", "mtp_depths", "chunk_size",
)  # fmt: skip
CONTEXT = "max_position_embeddings"
WITH_MTP = ("nemotron_h", "deepseek_v3")


def difference(first: ModelConfig, second: ModelConfig, *, free: Iterable[str] = ()) -> str | None:
    """The first field in which two models differ, None if they are the same. Pipeline segments and fields that nothing
    reads make no difference."""
    first, second = plain_model(first), plain_model(second)
    for field in dataclasses.fields(ModelConfig):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if field.name == "pattern":
            a, b = (first.layers.main, first.layers.mtp), (second.layers.main, second.layers.mtp)
        if a != b and field.name not in free:
            return field.name
    return None


def read_config(values: dict[str, Any], *, mtp: bool = True) -> tuple[str, ModelConfig]:
    """The family and the model that a config.json describes. Raises ConfigError.

    mtp: whether its files hold a multi-token-prediction block; transformers drops the block and keeps the field.
    """
    fields = Fields(values)
    family = fields.family
    read_quantization(values)
    form = FORMS[family]
    found = {ours: fields.get(theirs) for ours, theirs in form.names.items()}
    found |= form.fixed
    found |= form.read(fields)
    if not mtp:
        found["pattern"] = found["pattern"].split("/")[0]
        found.pop("mtp_depths", None)
    # A config.json states fields of layers that its model lacks.
    model = ModelConfig(**{k: v for k, v in found.items() if layers_read(found["pattern"], k)})
    return family, plain_model(model)


def mtp_blocks(values: dict[str, Any]) -> int:
    """How many multi-token-prediction blocks a config.json states, at least one: the count in files that hold any."""
    fields = Fields(values)
    return max(1, fields.get("num_nextn_predict_layers")) if fields.family in WITH_MTP else 1


def write_config(
    family: str, config: ModelConfig, kept: dict[str, Any] | None = None, *, context: int | None = None
) -> dict[str, Any]:
    """The config.json of a model: `kept`, the one it came with, with its statements about the model updated.

    context: tokens per sequence in training, which the config states unless `kept` states more; None: unknown. Raises
    ConfigError, naming the field, if the family cannot hold such a model.
    """
    if kept is not None and kept.get("model_type") == family:
        same = kept | _context(family, kept, context)
        if difference(config, read_config(same, mtp=bool(config.layers.mtp))[1], free=FREE) is None:
            return same
    form = FORMS[family]
    fresh = {theirs: getattr(config, ours) for ours, theirs in form.names.items()}
    fresh = {k: v for k, v in fresh.items() if v is not None or k in NULLS.get(family, {})}
    fresh |= form.write(config)
    fresh |= {
        "architectures": [form.architecture],
        "model_type": family,
    } | _context(family, kept or {}, context)
    field = difference(config, read_config(fresh)[1], free=FREE)
    if field is not None:
        raise ConfigError(
            f"ModelConfig.{field} is {getattr(config, field)!r}; expected what Hugging Face's {family} can hold"
        )
    reader = Fields({**(kept or {}), "model_type": family})
    for theirs in form.names.values():
        reader.get(theirs)
    form.read(reader)
    stale = reader.read
    return {k: v for k, v in (kept or {}).items() if k not in stale} | fresh


def _context(family: str, kept: dict[str, Any], context: int | None) -> dict[str, int]:
    """The field of the context length, if it is to change. GPT-2's is always the number of its position vectors."""
    stated = kept.get(CONTEXT)
    if context is None or family == "gpt2" or (isinstance(stated, int) and stated >= context):
        return {}
    return {CONTEXT: context}


def family_of(config: ModelConfig) -> str:
    """The first family whose checkpoints can hold the model. Raises ConfigError if none can: why nemotron_h cannot."""
    refusals = []
    for family in FORMS:
        try:
            write_config(family, config)
            return family
        except ConfigError as error:
            refusals.append(error)
    raise refusals[0]
