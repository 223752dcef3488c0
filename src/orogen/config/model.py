"""What a model is: its layer pattern and its sizes, under the names of Hugging Face's `nemotron_h` config."""

import dataclasses

from orogen.config.checks import ABSENT, ConfigError, check_types, require, require_positive

LAYERS = {"M": "Mamba-2", "*": "attention", "-": "dense MLP", "E": "mixture of experts"}


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A parsed layer pattern.

    main: one letter a residual layer; segments: the same letters, cut at `|` into pipeline segments;
    mtp: the letters of the multi-token-prediction block ("" without one); mtp_parts: how often it was written.
    """

    main: str
    segments: tuple[str, ...]
    mtp: str
    mtp_parts: int


def parse_pattern(text: str) -> Pattern:
    """Reads `main("|"main)*("/"mtp)*`, Megatron's hybrid layer pattern.

    `MEM*E/*E/*E` is five layers and one block `*E` applied at two depths. Raises ConfigError on an unknown letter,
    an empty main pattern, an empty or differing part after `/`, or a `|` after `/`.
    """
    main, *parts = text.split("/")
    unknown = sorted(set(text) - set(LAYERS) - set("|/"))
    letters = ", ".join(f"{letter} ({name})" for letter, name in LAYERS.items())
    if unknown:
        raise ConfigError(f"ModelConfig.pattern is {text!r}: unknown letter {unknown[0]!r}; expected {letters}, | or /")
    layers = main.replace("|", "")
    if not layers:
        raise ConfigError(f"ModelConfig.pattern is {text!r}; expected at least one layer before any /")
    if len(set(parts)) > 1 or any(not part or "|" in part for part in parts):
        raise ConfigError(
            f"ModelConfig.pattern is {text!r}; expected the parts after / to be equal, not empty, without |"
        )
    return Pattern(layers, tuple(main.split("|")), parts[0] if parts else "", len(parts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A hybrid model. Fields that only one layer type reads may stay None when the pattern has no such layer."""

    pattern: str
    vocab_size: int
    hidden_size: int
    layer_norm_epsilon: float = 1e-5
    # attention (*)
    num_attention_heads: int = ABSENT
    num_key_value_heads: int = ABSENT
    head_dim: int = ABSENT
    # dense MLP (-)
    intermediate_size: int = ABSENT
    # Mamba-2 (M)
    mamba_num_heads: int = ABSENT
    mamba_head_dim: int = ABSENT
    n_groups: int = ABSENT
    ssm_state_size: int = ABSENT
    conv_kernel: int = 4
    chunk_size: int = 128
    # mixture of experts (E); n_group and topk_group are the router's groups, n_groups is Mamba's
    n_routed_experts: int = ABSENT
    num_experts_per_tok: int = ABSENT
    moe_intermediate_size: int = ABSENT
    moe_shared_expert_intermediate_size: int = ABSENT
    moe_latent_size: int = ABSENT
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    router_aux_loss_coef: float = 1e-4
    router_z_loss_coef: float = 0.0
    # multi-token prediction: how often the one block after / is applied, and its share of the loss
    mtp_depths: int = 0
    mtp_loss_scale: float = 0.3

    def __post_init__(self) -> None:
        check_types(self)
        sizes = (f.name for f in dataclasses.fields(self) if f.type is int and f.name != "mtp_depths")
        require_positive(self, *sizes, "layer_norm_epsilon", "routed_scaling_factor")
        for field in ("router_aux_loss_coef", "router_z_loss_coef", "mtp_loss_scale"):
            require(getattr(self, field) >= 0, self, field, "0 or more")
        pattern = parse_pattern(self.pattern)
        self._check_mtp(pattern)
        letters = set(pattern.main + pattern.mtp)
        if "*" in letters:
            self._need("*", "num_attention_heads", "num_key_value_heads", "head_dim")
            self._divides("num_key_value_heads", "num_attention_heads")
        if "-" in letters:
            self._need("-", "intermediate_size")
        if "M" in letters:
            self._need("M", "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
            self._divides("n_groups", "mamba_num_heads")
        if "E" in letters:
            self._check_experts()

    @property
    def layers(self) -> Pattern:
        """The parsed pattern."""
        return parse_pattern(self.pattern)

    @property
    def init_std(self) -> float:
        """Standard deviation of the initial weights, sqrt(0.8 / d): the value of every Nemotron 3 recipe."""
        return (0.8 / self.hidden_size) ** 0.5

    @property
    def output_init_std(self) -> float:
        """Of projections back into the residual stream: init_std / sqrt(number of residual layers).

        Megatron divides by sqrt(m·L) with m = 1 for hybrids, whose L counts residual layers, and m = 2 for pure
        transformers, whose L counts pairs of them: the same number.
        """
        return self.init_std / len(self.layers.main) ** 0.5

    @property
    def expert_width(self) -> int:
        """Width of the vectors that the routed experts read and write."""
        return self.moe_latent_size or self.hidden_size

    def _need(self, letter: str, *fields: str) -> None:
        for field in fields:
            require(getattr(self, field) is not None, self, field, f"a number: the pattern has {LAYERS[letter]} layers")

    def _divides(self, field: str, whole: str) -> None:
        total = getattr(self, whole)
        require(total % getattr(self, field) == 0, self, field, f"a divisor of {whole} = {total}")

    def _check_mtp(self, pattern: Pattern) -> None:
        depths = f"{pattern.mtp_parts}, the number of parts after / in the pattern"
        if not pattern.mtp:
            require(self.mtp_depths == 0, self, "mtp_depths", "0: the pattern has no part after /")
        elif pattern.mtp_parts > 1:
            require(self.mtp_depths in (0, pattern.mtp_parts), self, "mtp_depths", depths)
            object.__setattr__(self, "mtp_depths", pattern.mtp_parts)
        else:
            require(self.mtp_depths >= 0, self, "mtp_depths", "0 or more")
            object.__setattr__(self, "mtp_depths", self.mtp_depths or 1)

    def _check_experts(self) -> None:
        self._need("E", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
        self._divides("n_group", "n_routed_experts")
        require(self.topk_group <= self.n_group, self, "topk_group", f"at most n_group = {self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        require(
            self.num_experts_per_tok <= reachable,
            self,
            "num_experts_per_tok",
            f"at most {reachable}, the experts in topk_group groups",
        )
