"""What a model is: its layer pattern and its sizes, under the names of Hugging Face's `nemotron_h` config."""

import dataclasses
from typing import Annotated

from orogen.config.checks import (
    ABSENT,
    check_types,
    field_types,
    require,
    require_choice,
    require_not_negative,
    require_positive,
)
from orogen.config.kinds import LAYERS, kind_of
from orogen.config.pattern import MAX_LAYERS, Pattern, parse_pattern

NORMS = ("rms", "rms_cast_first", "layer", "layer_1p")
ACTIVATIONS = ("relu2", "relu", "silu", "gelu", "gelu_tanh")
ATTENTION_BIASES = ("none", "qkv", "all")
MAX_ROTATED = 2**16  # one frequency per pair is computed on the host wherever a model is built
MOE_BIASES = ("routed", "shared")
ROUTER_SCORES = ("sigmoid", "softmax", "softmax_topk")
ROUTER_BALANCES = ("row", "global")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A hybrid model. Fields that only one layer type reads may stay None if the pattern has no such layer.

    norm: rms_cast_first casts to the compute dtype before it multiplies by the weight (Llama, Qwen), rms after it
    (Nemotron); layer_1p stores its weight minus one.
    swiglu_limit: with limit c the gated MLP is gpt-oss's (clip(up x, ±c) + 1) · g · sigmoid(1.702 g), where
    g = min(gate x, c).
    moe_bias: with mlp_bias, either the routed experts' projections have biases (gpt-oss), or the shared expert's and
    the latent projections do (nemotron_h).
    router_bias is part of the logits; router_correction_bias is not, and gets no gradient.
    router_balance: row and global are Megatron's seq_aux_loss and global_aux_loss.
    """

    pattern: Annotated[str, "one letter per layer, `|` between pipeline segments, the MTP block after `/`: `MEM*E/*E`"]
    vocab_size: Annotated[int, "tokens of the vocabulary: rows of embedding and head"]
    hidden_size: Annotated[int, "width of the residual stream"]
    norm: Annotated[
        str, "rms, rms_cast_first, layer or layer_1p: of every residual layer, the final norm and attention's own"
    ] = "rms"
    layer_norm_epsilon: Annotated[float, "added to the variance in norms; those of MLA's latent vectors add 1e-6"] = (
        1e-5
    )
    tie_word_embeddings: Annotated[bool, "whether the head is the transposed embedding"] = False
    score_head: Annotated[bool, "whether a scalar head, a reward model's, stands beside the head"] = False
    learned_positions: Annotated[int, "number of learned position embeddings; None: none"] = ABSENT
    # attention (*, w, +)
    num_attention_heads: Annotated[int, "query heads"] = ABSENT
    num_key_value_heads: Annotated[int, "key heads, each shared by equally many query heads"] = ABSENT
    head_dim: Annotated[int, "width of a query, key or value head"] = ABSENT
    attention_bias: Annotated[str, "which projections have a bias: none, qkv or all"] = "none"
    qk_norm: Annotated[bool, "whether queries and keys are normalised per head"] = False
    attention_sinks: Annotated[bool, "whether each head has a learned logit in the softmax's denominator"] = False
    sliding_window: Annotated[int, "how many tokens a token in a `w` layer sees, its own included"] = ABSENT
    # rotary positions
    rope_theta: Annotated[float, "base of the rotary frequencies; None: attention has no rotary positions"] = ABSENT
    partial_rotary_factor: Annotated[float, "share of head_dim that is rotated"] = 1.0
    rope_interleave: Annotated[bool, "whether a rotated pair is two neighbours instead of one from each half"] = False
    yarn_factor: Annotated[float, "factor by which YaRN (arXiv:2309.00071) extends the context; None: no YaRN"] = ABSENT
    yarn_original_positions: Annotated[int, "context length before YaRN"] = ABSENT
    yarn_beta_fast: Annotated[float, "rotations over the original context above which a frequency is kept"] = 32.0
    yarn_beta_slow: Annotated[
        float, "rotations over the original context below which a frequency is divided by yarn_factor"
    ] = 1.0
    yarn_mscale: Annotated[float, "temperature coefficient in YaRN's scale of the rotary cosines and sines"] = ABSENT
    yarn_mscale_all_dim: Annotated[
        float, "temperature coefficient that divides that scale, and in `+` layers scales the logits"
    ] = ABSENT
    yarn_truncate: Annotated[bool, "whether YaRN's two bounds are rounded to whole frequencies"] = True
    # multi-head latent attention (+)
    q_lora_rank: Annotated[int, "width of the latent query; None projects queries directly"] = ABSENT
    kv_lora_rank: Annotated[int, "width of the latent that keys and values are projected from"] = ABSENT
    qk_nope_head_dim: Annotated[int, "part of a query or key head without rotary positions"] = ABSENT
    qk_rope_head_dim: Annotated[int, "part of a query or key head with rotary positions"] = ABSENT
    v_head_dim: Annotated[int, "width of a value head"] = ABSENT
    # dense MLP (-), and the form of experts
    intermediate_size: Annotated[int, "hidden units of the dense MLP"] = ABSENT
    mlp_hidden_act: Annotated[str, "relu2, relu, silu, gelu or gelu_tanh, in experts too"] = "relu2"
    mlp_gated: Annotated[bool, "down(act(gate x) · up x) in place of down(act(up x)), in experts too"] = False
    mlp_bias: Annotated[bool, "whether projections have biases; moe_bias says which ones in an expert layer"] = False
    swiglu_limit: Annotated[float, "bound of gpt-oss's clipped SwiGLU; None: no bound"] = ABSENT
    # Mamba-2 (M)
    mamba_num_heads: Annotated[int, "heads of Mamba-2"] = ABSENT
    mamba_head_dim: Annotated[int, "width of a Mamba-2 head"] = ABSENT
    n_groups: Annotated[int, "groups of heads that share B and C"] = ABSENT
    chunk_size: Annotated[int, "tokens per chunk of the SSD algorithm"] = 128
    mamba_norm_groups: Annotated[int, "groups of the gated norm; None: n_groups"] = ABSENT
    time_step_min: Annotated[float, "lower bound that softplus(dt) is clipped to; None: no bound"] = ABSENT
    time_step_max: Annotated[float, "upper bound that softplus(dt) is clipped to; None: no bound"] = ABSENT
    # Mamba-1 (m)
    mamba_intermediate_size: Annotated[int, "channels of Mamba-1"] = ABSENT
    time_step_rank: Annotated[int, "rank of Mamba-1's time-step projection"] = ABSENT
    # both Mambas
    ssm_state_size: Annotated[int, "state size per channel"] = ABSENT
    conv_kernel: Annotated[int, "taps of the causal convolution"] = 4
    use_conv_bias: Annotated[bool, "whether the convolution has a bias"] = True
    mamba_proj_bias: Annotated[bool, "whether the input and output projections have biases"] = False
    # mixture of experts (E)
    n_routed_experts: Annotated[int, "experts that the router chooses from"] = ABSENT
    num_experts_per_tok: Annotated[int, "experts that each token is sent to"] = ABSENT
    moe_intermediate_size: Annotated[int, "hidden units of a routed expert"] = ABSENT
    moe_shared_expert_intermediate_size: Annotated[int, "hidden units of the shared expert; None: no shared expert"] = (
        ABSENT
    )
    moe_shared_expert_gate: Annotated[bool, "whether a sigmoid gate weighs the shared expert's output"] = False
    moe_latent_size: Annotated[
        int, "width that tokens are projected to for the routed experts (LatentMoE); None: hidden_size"
    ] = ABSENT
    moe_bias: Annotated[
        str,
        "which projections mlp_bias gives biases: routed (of experts), or shared (of the shared expert and the latent)",
    ] = "routed"
    router_score: Annotated[str, "sigmoid, softmax, or softmax_topk: a softmax over the chosen logits alone"] = (
        "sigmoid"
    )
    router_bias: Annotated[bool, "whether the logits have a learned bias"] = False
    router_correction_bias: Annotated[
        bool, "whether a bias, updated from the load, is added to the scores that choose experts"
    ] = True
    norm_topk_prob: Annotated[bool, "whether the weights of the chosen experts are divided by their sum"] = True
    routed_scaling_factor: Annotated[float, "factor of the weights of the chosen experts"] = 1.0
    n_group: Annotated[int, "groups of experts; each token's experts are in topk_group of them"] = 1
    topk_group: Annotated[int, "how many of the n_group groups the router chooses for a token"] = 1
    router_aux_loss_coef: Annotated[float, "weight of the balance loss"] = 1e-4
    router_balance: Annotated[
        str, "what the balance loss is taken over: row (each sequence), or global (all sequences and microbatches)"
    ] = "row"
    router_z_loss_coef: Annotated[float, "weight of the loss on the router's squared log-sum-exp"] = 0.0
    # gated cross-attention (x) and its resampler
    image_feature_size: Annotated[int, "width of the vision encoder's feature vectors"] = ABSENT
    image_features: Annotated[int, "feature vectors of an image"] = ABSENT
    resampler_latents: Annotated[int, "vectors that the perceiver resampler makes of an image"] = ABSENT
    resampler_layers: Annotated[int, "layers of the perceiver resampler, and of the encoder of captions"] = ABSENT
    retrieved_captions: Annotated[int, "captions of an image that are encoded and attended to; None: none"] = ABSENT
    caption_tokens: Annotated[int, "tokens of an encoded caption, cut off or padded; None: captions are not"] = ABSENT
    # multi-token prediction
    mtp_depths: Annotated[int, "how many times the one block after `/` is applied"] = 0
    mtp_loss_scale: Annotated[float, "weight of the mean MTP loss"] = 0.3

    def __post_init__(self) -> None:
        check_types(self)
        sizes = (name for name, kind in field_types(ModelConfig).items() if kind is int and name != "mtp_depths")
        require_positive(self, *sizes, "layer_norm_epsilon", "routed_scaling_factor", "rope_theta", "yarn_factor")
        require_positive(self, "yarn_beta_fast", "yarn_beta_slow", "yarn_mscale", "yarn_mscale_all_dim", "swiglu_limit")
        require_not_negative(self, "router_aux_loss_coef", "router_z_loss_coef", "mtp_loss_scale")
        require_choice(self, "norm", NORMS)
        pattern = parse_pattern(self.pattern)
        self._check_mtp(pattern)
        deeper = len(pattern.mtp) * self.mtp_depths
        require(deeper <= MAX_LAYERS, self, "mtp_depths", f"at most {MAX_LAYERS:,} layers after /, not {deeper:,}")
        letters = set(pattern.main + pattern.mtp)
        for letter in LAYERS:
            if letter in letters:
                self._check_needs(letter)
        if letters & set("*w+"):
            self._check_attention(letters)
        if letters & set("-Exg"):
            self._check_activation()
        if "x" in letters:
            self._check_cross_attention(pattern)
        if "M" in letters:
            self._check_mamba2()
        if "E" in letters:
            self._check_experts()

    @property
    def layers(self) -> Pattern:
        """The parsed pattern."""
        return parse_pattern(self.pattern)

    def warnings(self) -> list[str]:
        """What is legal but probably not meant, one line each."""
        whole = self.router_score == "softmax_topk" or self.norm_topk_prob
        if self.num_experts_per_tok != 1 or not whole or "E" not in self.layers.main + self.layers.mtp:
            return []
        why = "router_score='softmax_topk'" if self.router_score == "softmax_topk" else "norm_topk_prob=True"
        return [
            f"num_experts_per_tok=1 with {why}: the one expert's weight is always 1, so the router gets no gradient "
            "from the model's loss; expected two experts or more, or a weight that is the score itself"
        ]

    @property
    def init_std(self) -> float:
        """Standard deviation of the initial weights, sqrt(0.8 / d): the value of every Nemotron 3 recipe."""
        return (0.8 / self.hidden_size) ** 0.5

    @property
    def output_init_std(self) -> float:
        """Standard deviation of projections back into the residual stream: init_std / sqrt(number of residual layers).

        Megatron divides by sqrt(m·L) with m = 1 for hybrids, whose L counts residual layers, and m = 2 for pure
        transformers, whose L counts pairs of them: the same number.
        """
        return self.init_std / len(self.layers.main) ** 0.5

    @property
    def expert_width(self) -> int:
        """Width of the vectors that the routed experts read and write."""
        return self.moe_latent_size or self.hidden_size

    @property
    def routed_expert_bias(self) -> bool:
        """Whether the routed experts' projections have biases."""
        return self.mlp_bias and self.moe_bias == "routed"

    @property
    def shared_expert_bias(self) -> bool:
        """Whether the projections of the shared expert, and into and out of the latent, have biases."""
        return self.mlp_bias and self.moe_bias == "shared"

    @property
    def reach(self) -> int:
        """How many tokens ahead or back a position reads at most, other than through attention and states: ahead the
        targets of the deepest MTP depth, back the convolution's taps."""
        return max(self.mtp_depths + 1, self.taps - 1)

    @property
    def taps(self) -> int:
        """The most taps of its layers' causal convolutions; 1 if none has one."""
        fields = {kind_of(letter).taps for letter in {*self.layers.main, *self.layers.mtp}} - {""}
        return max((getattr(self, field) for field in fields), default=1)

    def _check_needs(self, letter: str) -> None:
        kind = kind_of(letter)
        for field in kind.needs.split():
            require(getattr(self, field) is not None, self, field, f"a number: the pattern has {kind.name} layers")

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

    def _check_attention(self, letters: set[str]) -> None:
        require_choice(self, "attention_bias", ATTENTION_BIASES)
        if letters & set("*w"):
            self._divides("num_key_value_heads", "num_attention_heads")
            self._check_rotary("head_dim")
        if "+" in letters:
            require(self.qk_rope_head_dim % 2 == 0, self, "qk_rope_head_dim", "an even number")
            require(self.qk_rope_head_dim <= MAX_ROTATED, self, "qk_rope_head_dim", f"at most {MAX_ROTATED:,}")
            self._check_yarn()
            require(self.attention_bias != "qkv", self, "attention_bias", "none or all: the pattern has + layers")
            expected = "1.0: the pattern has + layers, which rotate all of qk_rope_head_dim"
            require(self.partial_rotary_factor == 1, self, "partial_rotary_factor", expected)
            for field in ("qk_norm", "attention_sinks"):
                require(not getattr(self, field), self, field, "False: the pattern has + layers, which have none")

    @property
    def image_vectors(self) -> int:
        """What a cross-attention layer sees of an image: its latents, and the tokens of its captions."""
        return (self.resampler_latents or 0) + (self.encoded_tokens or 0)

    @property
    def encoded_tokens(self) -> int | None:
        """Tokens of all captions of an image that are encoded; None if captions are not."""
        if self.retrieved_captions is None or self.caption_tokens is None:
            return None
        return self.retrieved_captions * self.caption_tokens

    def _check_cross_attention(self, pattern: Pattern) -> None:
        require("x" not in pattern.mtp, self, "pattern", "no x after /: an MTP block sees no images")
        self._divides("num_key_value_heads", "num_attention_heads")
        both = (self.retrieved_captions is None) == (self.caption_tokens is None)
        require(both, self, "caption_tokens", f"None or a size, as retrieved_captions = {self.retrieved_captions}")

    def _check_rotary(self, size: str) -> None:
        if self.rope_theta is None:
            require(self.yarn_factor is None, self, "yarn_factor", "None: rope_theta is None")
            return
        factor, head = self.partial_rotary_factor, getattr(self, size)
        require(head <= MAX_ROTATED, self, size, f"at most {MAX_ROTATED:,} with rotary positions")
        rotated = int(head * factor) if 0 < factor <= 1 else 0
        expected = f"above 0 and up to 1, so that it leaves an even number of {size} = {head}"
        require(rotated > 0 and rotated % 2 == 0, self, "partial_rotary_factor", expected)
        self._check_yarn()

    def _check_yarn(self) -> None:
        if self.yarn_factor is not None:
            require(self.yarn_factor >= 1, self, "yarn_factor", "1 or more")
            expected = "a number: yarn_factor is set"
            require(self.yarn_original_positions is not None, self, "yarn_original_positions", expected)

    def _check_activation(self) -> None:
        require_choice(self, "mlp_hidden_act", ACTIVATIONS)
        if self.swiglu_limit is not None:
            gated = self.mlp_gated and self.mlp_hidden_act == "silu"
            require(gated, self, "swiglu_limit", "None: mlp_hidden_act is not 'silu', or mlp_gated is False")

    def _check_mamba2(self) -> None:
        self._divides("n_groups", "mamba_num_heads")
        if self.mamba_norm_groups is not None:
            self._divides("mamba_norm_groups", "mamba_num_heads")
        low, high = self.time_step_min, self.time_step_max
        require_not_negative(self, "time_step_min")
        require(high is None or high > (low or 0), self, "time_step_max", f"above time_step_min = {low}")

    def _check_experts(self) -> None:
        require_choice(self, "router_score", ROUTER_SCORES)
        require_choice(self, "router_balance", ROUTER_BALANCES)
        require_choice(self, "moe_bias", MOE_BIASES)
        if self.moe_shared_expert_gate:
            expected = "False: moe_shared_expert_intermediate_size is None"
            require(self.moe_shared_expert_intermediate_size is not None, self, "moe_shared_expert_gate", expected)
        self._divides("n_group", "n_routed_experts")
        require(self.topk_group <= self.n_group, self, "topk_group", f"at most n_group = {self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        expected = f"at most {reachable}, the experts in topk_group groups"
        require(self.num_experts_per_tok <= reachable, self, "num_experts_per_tok", expected)
