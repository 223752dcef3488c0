"""How a trained model is quantised: formats by layer and kind of weight, the choice of scales, and calibration."""

import dataclasses
from typing import Annotated

from orogen.config.checks import check_types, require, require_choice, require_not_negative, require_positive
from orogen.config.model import ModelConfig
from orogen.config.precision import GROUPS, HEAD, KINDS, PLAIN
from orogen.config.rounded import Operand, weight_kinds

AUTO = "auto"
FORMATS = ("fp8", "fp8_channel", "nvfp4")
# Bits of one number, without its scales: what effective bits count, as ModelOpt does.
BITS = {PLAIN: 16, "fp8": 8, "fp8_channel": 8, "nvfp4": 4}
SCALES = ("max", "mse", "four_over_six")
ROUTED = "routed"
# Weights whose formats are chosen together, by the name of the unit: of experts, all matrices of a layer.
UNITS = {**{kind: (kind,) for kind in KINDS if kind not in GROUPS[ROUTED]}, ROUTED: GROUPS[ROUTED]}
ATTENTION, MAMBA = "*w+", "Mm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The format of a weight, how its scales are chosen, and whether the product's input is rounded too, with a scale
    that calibration found."""

    format: str
    scales: str = "max"
    inputs: bool = False

    @property
    def weight(self) -> Operand:
        """How the weight is rounded. With fp8_channel, each column of outputs is a tensor."""
        if self.format == "nvfp4":
            chosen = {"four_over_six": self.scales == "four_over_six", "search": self.scales == "mse"}
            return Operand(element="e2m1", scale="two_level", block=16, **chosen)
        return Operand(element="e4m3", scale="tensor")

    @property
    def input(self) -> Operand:
        """How the product's input is rounded."""
        if self.format == "nvfp4":
            return Operand(element="e2m1", scale="two_level", block=16)
        return Operand(element="e4m3", scale="tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What a product of a model that is being quantised measures in addition to its result: its input's largest
    magnitude and, for each candidate, the error of its output, weighted by the gradient.

    applied: the input is rounded first, and with `weights` the weight too, as this target says.
    """

    candidates: tuple[Target, ...] = ()
    applied: Target | None = None
    weights: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Post-training quantisation of the layers' weights. Embeddings, head, routers, convolutions, norms and the
    multi-token-prediction block stay as they are, as in every published Nemotron 3 checkpoint.

    format: fp8 (E4M3, one scale per matrix), fp8_channel (one per output channel), nvfp4 (E2M1, an E4M3 scale per 16
    numbers along the input and a float32 one per matrix) or auto. Matrices that read one input, such as Mamba's
    projections or queries, keys and values, share their float32 scale. An expert has scales of its own.
    scales: nvfp4's block scales from the block's largest magnitude (max), by least squared error among all scales that
    E4M3 has (mse), or of the two that make it 4 or 6 (four_over_six, arXiv:2512.02010).
    keep: entries 'KIND:FORMAT'; a later entry wins. KIND as in PrecisionConfig.keep; the matrices of
    a layer's experts have one format, 'routed:FORMAT'. With auto, FORMAT may be several, 'KIND:nvfp4|fp8|plain', of
    which one is chosen.
    auto: minimises the sum of Σ (g ⊙ Δy)² over layers, where g is the loss's gradient and Δy the error of the output,
    under effective_bits (AutoQuantize of ModelOpt). Bits are averaged over all weights of the layers' products; with
    cost = active, a routed expert's weight counts by the share of experts that process a token.
    """

    format: Annotated[str, "fp8, fp8_channel, nvfp4 or auto"]
    scales: Annotated[str, "how nvfp4's block scales are chosen: max, mse or four_over_six"] = "max"
    inputs: Annotated[str, "static: inputs are rounded with calibrated scales; none: weights alone are quantised"] = (
        "static"
    )
    keep: Annotated[tuple[str, ...], "kinds of weight with another format: 'KIND:FORMAT'"] = (
        "attention:plain",
        "latent:plain",
    )
    first_layers: Annotated[int, "so many first layers of the pattern stay as they are"] = 0
    last_layers: Annotated[int, "so many last layers of the pattern stay as they are"] = 0
    keep_before_attention: Annotated[bool, "whether the Mamba layer in front of each attention layer stays too"] = False
    key_values: Annotated[str, "fp8: static scales of keys and values are calibrated too, for engines; none"] = "none"
    # calibration
    calibration_tokens: Annotated[int, "tokens whose inputs decide static scales"] = 131072
    heldout_tokens: Annotated[int, "tokens of other text, on which the loss is measured before and after"] = 65536
    batch_size: Annotated[int, "sequences at a time"] = 4
    sequence_length: Annotated[int, "tokens per sequence of calibration and measurement"] = 1024
    # of auto
    candidates: Annotated[tuple[str, ...], "formats that auto chooses from: some of nvfp4, fp8, fp8_channel, plain"] = (
        "nvfp4",
        "fp8",
        "plain",
    )
    effective_bits: Annotated[float, "mean bits per weight that auto may spend, without scales"] = 4.75
    cost: Annotated[str, "what auto counts: weights, or active (those that process a token)"] = "weights"
    score_tokens: Annotated[int, "of calibration_tokens, the first so many, on which auto measures sensitivities"] = (
        32768
    )

    def __post_init__(self) -> None:
        check_types(self)
        require_choice(self, "format", (*FORMATS, AUTO))
        require_choice(self, "scales", SCALES)
        require_choice(self, "inputs", ("static", "none"))
        require_choice(self, "key_values", ("none", "fp8"))
        require_choice(self, "cost", ("weights", "active"))
        require_not_negative(self, "first_layers", "last_layers")
        require_positive(self, "calibration_tokens", "heldout_tokens", "batch_size", "effective_bits", "score_tokens")
        few = self.format != AUTO or self.score_tokens <= self.calibration_tokens
        first = f"at most calibration_tokens = {self.calibration_tokens}, whose first ones they are"
        require(few, self, "score_tokens", first)
        require(self.sequence_length >= 2, self, "sequence_length", "at least 2, a token and its target")
        for field in ("keep", "candidates"):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # gin may give a list
        known = all(name in BITS for name in self.candidates) and len(set(self.candidates)) == len(self.candidates) > 0
        require(known, self, "candidates", f"different ones of {', '.join(BITS)}")
        for entry in self.keep:
            kind, _, names = entry.partition(":")
            expected = f"entries KIND:FORMAT whose kind is one of {', '.join((*GROUPS, *KINDS))}"
            require(kind != HEAD, self, "keep", "no head: it stays as it is")
            require(kind in GROUPS or kind in KINDS, self, "keep", expected)
            formats = names.split("|")
            require(all(n in BITS for n in formats), self, "keep", f"formats that are some of {', '.join(BITS)}")
            several = len(formats) == 1 or self.format == AUTO
            require(several, self, "keep", f"one format per kind: several need format {AUTO!r}")
            whole = kind not in GROUPS[ROUTED]
            require(
                whole, self, "keep", f"{ROUTED} in place of {kind}: all matrices of a layer's experts have one format"
            )

    def target(self, name: str) -> Target:
        """The target of a format."""
        return Target(format=name, scales=self.scales, inputs=self.inputs == "static")

    def choices(self, model: ModelConfig) -> tuple[dict[str, tuple[str, ...]], ...]:
        """For each layer of the pattern and each kind of its weights, the formats that it may have. Raises ConfigError
        if the model has no such layers or kinds."""
        main = model.layers.main
        kept = self.first_layers + self.last_layers
        expected = f"fewer than {len(main)} first and last layers together, as many as the pattern has"
        require(kept < len(main), self, "last_layers", expected)
        inner = range(self.first_layers, len(main) - self.last_layers)
        present = {kind for letter in main for kind in weight_kinds(letter, model)}
        usual = self.candidates if self.format == AUTO else (self.format,)
        named = dict.fromkeys(KINDS, usual)
        for entry in self.keep:
            kind, _, names = entry.partition(":")
            named |= dict.fromkeys(GROUPS.get(kind, (kind,)), tuple(names.split("|")))
        found = []
        for number, letter in enumerate(main):
            feeds = letter in MAMBA and main[number + 1 : number + 2] in (*ATTENTION,)
            stays = number not in inner or (self.keep_before_attention and feeds)
            found.append({kind: (PLAIN,) if stays else named[kind] for kind in weight_kinds(letter, model)})
        expected = f"something to quantise among {', '.join(sorted(present))}, the kinds of {model.pattern!r}"
        require(any(set(c) != {PLAIN} for layer in found for c in layer.values()), self, "keep", expected)
        return tuple(found)
