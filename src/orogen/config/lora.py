"""Low-rank adapters: which weights get them, and the model with them, as it is trained."""

import dataclasses
from typing import Annotated

from orogen.config.checks import ABSENT, ConfigError, check_types, require, require_positive
from orogen.config.model import ModelConfig
from orogen.config.precision import GROUPS, KINDS
from orogen.config.rounded import weight_kinds

ADAPTABLE = tuple(group for group in GROUPS if group != "mtp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation (LoRA, arXiv:2106.09685): x W + alpha / rank · x A B, where W stays and A and B are trained.

    A is drawn uniformly from ±1/√inputs and B is zero, as in PEFT, so the model first computes what it did.
    Besides the adapters, only the parts that `OptimizerConfig.trained` names are trained, whole. A run folder opens as
    the model with the products added to its weights; `orogen convert to-peft` writes the adapters alone.
    weights: named by what they do, as in `PrecisionConfig.keep`. Each expert has factors of its own. PEFT reads no
    adapters of routed experts or of mamba_out.
    """

    rank: Annotated[int, "columns of A, rows of B"]
    alpha: Annotated[float, "x A B is multiplied by alpha / rank; None: by 1"] = ABSENT
    weights: Annotated[
        tuple[str, ...], "dense, shared, routed, latent, mamba, attention, or their parts such as mamba_out"
    ] = ("attention", "mamba_in", "dense", "shared", "latent")

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "weights", tuple(self.weights))  # gin may give a list
        require_positive(self, "rank", "alpha")
        known = {*ADAPTABLE, *(kind for group in ADAPTABLE for kind in GROUPS[group])}
        expected = f"some of {', '.join(ADAPTABLE)}, or of their parts, each once"
        fine = self.weights and set(self.weights) <= known and len(set(self.weights)) == len(self.weights)
        require(bool(fine), self, "weights", expected)

    @property
    def scale(self) -> float:
        """The factor of x A B."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of weight that have adapters."""
        return frozenset(kind for name in self.weights for kind in GROUPS.get(name, (name,)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedModel(ModelConfig):
    """A model whose weights have adapters beside them."""

    lora: LoraConfig

    @property
    def base(self) -> ModelConfig:
        """The model without adapters."""
        return ModelConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ModelConfig)})


def adapted(model: ModelConfig, lora: LoraConfig) -> AdaptedModel:
    """The model with adapters. Raises ConfigError if it has no weight for them."""
    names = {name for name in lora.weights if kinds_in(model) & {*GROUPS.get(name, (name,))}}
    # The default names what most models have, so some of its weights are enough.
    if not names or (len(names) < len(lora.weights) and lora.weights != LoraConfig.weights):
        found = ", ".join(kind for kind in KINDS if kind in kinds_in(model))
        raise ConfigError(f"LoraConfig.weights is {lora.weights!r}; expected weights that the model has: {found}")
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(ModelConfig)}
    return AdaptedModel(**fields, lora=lora)


def kinds_in(model: ModelConfig) -> set[str]:
    """The kinds of weight in the model's layers."""
    return {kind for letter in set(model.layers.main + model.layers.mtp) for kind in weight_kinds(letter, model)}


def base_of(model: ModelConfig) -> ModelConfig:
    """The model without adapters."""
    return model.base if isinstance(model, AdaptedModel) else model
