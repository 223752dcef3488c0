"""Which smaller models a search looks at, what they may cost, and what ranks them."""

import dataclasses
import re
from typing import Annotated

from orogen.config.checks import ABSENT, ConfigError, check_types, require, require_not_negative, require_positive
from orogen.config.kinds import LAYERS, kind_of, listed
from orogen.config.model import ModelConfig

# Fields of ModelConfig whose values may vary, with the letters of the layers that read them; hidden_size: all do.
WIDTHS = {
    "hidden_size": "",
    "intermediate_size": "-",
    "mamba_num_heads": "M",
    "mamba_head_dim": "M",
    "num_attention_heads": "*w+",
    "n_routed_experts": "E",
    "moe_intermediate_size": "E",
    "moe_shared_expert_intermediate_size": "E",
    "moe_latent_size": "E",
}
ORDERS = ("layers", "parameters", "active", "bytes", "tokens_per_second")
_COUNTS = re.compile(r"(.):(\d+)-(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Smaller models of the width and depth of a larger one, ModelConfig, under a budget (Minitron, arXiv:2407.14679
    and 2504.11409; MiniPuzzle, arXiv:2504.03624).

    Every combination of the layers' numbers and of the widths is a candidate; a width without values stays. order: the
    candidates that keep the budgets are sorted by these, the most first (bytes: the least), the first one deciding.
    most_gib: of the weights of all parameters, with `weight_bits`, and of `requests` texts of `context` tokens: keys
    and values with `cache_bits`, Mamba's states with `state_bits`, and its windows with 16; and of what reading
    `prefill_chunk` tokens of a prompt takes, the hidden units of the widest MLP, with 16, as Megatron-LM's elastic
    models count it. least_tokens_per_second, fits: as `orogen simulate --inference` predicts them for EngineConfig's
    slots on ClusterConfig's hardware, with prompts and answers of prompt_tokens and new_tokens.
    scores: lines {"layer": 3, "removed": true, "score": 0.1} and {"layer": 3, "intermediate_size": 15360, "score":
    0.1}: how much the model's outputs change if that alone is replaced. With them, the search chooses for each layer by
    integer programming so that the sum of the scores is least (arXiv:2411.19146, eq. 1); widths are the same in all
    layers. A pruning that scored layers writes `removal.jsonl`, for `scores` or `removal`. Candidates that are pruned
    by its scores lack the layers that this file says, unless `removal` names another.
    """

    layers: Annotated[
        tuple[str, ...],
        "how many layers of a kind remain: LETTER:LEAST-MOST; others stay (with `scores` and no entry: any)",
    ] = ()
    depth: Annotated[tuple[int, int], "least and most layers in all; None: any"] = ABSENT
    hidden_size: Annotated[tuple[int, ...], "values of ModelConfig.hidden_size"] = ()
    intermediate_size: Annotated[tuple[int, ...], "values of ModelConfig.intermediate_size"] = ()
    mamba_num_heads: Annotated[tuple[int, ...], "values of ModelConfig.mamba_num_heads"] = ()
    mamba_head_dim: Annotated[tuple[int, ...], "values of ModelConfig.mamba_head_dim"] = ()
    num_attention_heads: Annotated[tuple[int, ...], "values of ModelConfig.num_attention_heads"] = ()
    n_routed_experts: Annotated[tuple[int, ...], "values of ModelConfig.n_routed_experts"] = ()
    moe_intermediate_size: Annotated[tuple[int, ...], "values of ModelConfig.moe_intermediate_size"] = ()
    moe_shared_expert_intermediate_size: Annotated[
        tuple[int, ...], "values of ModelConfig.moe_shared_expert_intermediate_size"
    ] = ()
    moe_latent_size: Annotated[tuple[int, ...], "values of ModelConfig.moe_latent_size"] = ()
    # budgets
    most_parameters: Annotated[float, "the most parameters in all; None: any"] = ABSENT
    most_active: Annotated[float, "the most parameters that one token uses; None: any"] = ABSENT
    most_gib: Annotated[float, "the most GiB of weights and of what requests keep; None: any"] = ABSENT
    least_tokens_per_second: Annotated[
        float, "the least tokens per second of all requests, as predicted; None: any"
    ] = ABSENT
    fits: Annotated[bool, "whether the engine must fit into a device of ClusterConfig's hardware"] = False
    # what the bytes are of
    context: Annotated[int, "tokens of each request's text"] = 8192
    requests: Annotated[int, "requests at once"] = 1
    weight_bits: Annotated[float, "bits per parameter"] = 16.0
    cache_bits: Annotated[float, "bits per key and value"] = 16.0
    state_bits: Annotated[float, "bits per number of Mamba's states"] = 32.0
    prefill_chunk: Annotated[
        int, "tokens of a prompt that are read at once, whose hidden units in the widest MLP count too; 0: none"
    ] = 0
    # what is simulated
    prompt_tokens: Annotated[int, "tokens of each simulated prompt"] = 1024
    new_tokens: Annotated[int, "tokens of each simulated answer"] = 1024
    # what is chosen
    order: Annotated[tuple[str, ...], f"by what candidates are sorted: some of {', '.join(ORDERS)}"] = ("parameters",)
    best: Annotated[int, "how many candidates are listed"] = 10
    scores: Annotated[str, "file of scores by layer and replacement; None: candidates are ranked by `order`"] = ABSENT
    removal: Annotated[
        str, "file of such scores that say which layers of a kind go first; None: evenly spread layers stay"
    ] = ABSENT

    def __post_init__(self) -> None:
        check_types(self)
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), list):  # gin may give a list
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        require_positive(self, "most_parameters", "most_active", "most_gib", "least_tokens_per_second", "context")
        require_positive(self, "requests", "weight_bits", "cache_bits", "state_bits", "best")
        require_positive(self, "prompt_tokens", "new_tokens")
        require_not_negative(self, "prefill_chunk")
        for name in WIDTHS:
            values = getattr(self, name)
            require(
                all(v > 0 for v in values) and len(set(values)) == len(values), self, name, "different sizes above 0"
            )
        known = set(self.order) <= set(ORDERS) and len(set(self.order)) == len(self.order) > 0
        require(known, self, "order", f"some of {', '.join(ORDERS)}, each once")
        counts = [_COUNTS.fullmatch(entry) for entry in self.layers]
        valid = all(m and m[1] in LAYERS and int(m[2]) <= int(m[3]) for m in counts)
        require(valid, self, "layers", f"entries LETTER:LEAST-MOST, such as 'M:20-27', of {' '.join(LAYERS)}")
        letters = [entry[0] for entry in self.layers]
        require(len(set(letters)) == len(letters), self, "layers", "each letter once")
        alone = self.removal is None or self.scores is None
        require(alone, self, "removal", "None: the scores of SearchConfig.scores say which layers are removed")
        rising = self.depth is None or 0 < self.depth[0] <= self.depth[1]
        require(rising, self, "depth", "two numbers above 0, the second at least the first")

    @property
    def budgets(self) -> dict[str, float]:
        """The largest value of each cost that has one."""
        found = {"parameters": self.most_parameters, "active": self.most_active, "gib": self.most_gib}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def simulates(self) -> bool:
        """Whether candidates are simulated."""
        return self.fits or self.least_tokens_per_second is not None or "tokens_per_second" in self.order

    def unread(self) -> list[str]:
        """The fields that this search does not read."""
        simulated = [] if self.simulates else ["prompt_tokens", "new_tokens"]
        return simulated if self.scores is None else [*simulated, "order"]

    def counts(self, model: ModelConfig) -> dict[str, range]:
        """By letter of the model, how many of its layers may remain. Raises ConfigError for layers that it lacks."""
        main = model.layers.main
        if foreign := [letter for letter in sorted(set(main + model.layers.mtp)) if not kind_of(letter).units]:
            expected = "none: such layers cannot be pruned"
            raise ConfigError(f"ModelConfig.pattern has layers {listed(foreign)}; expected {expected}")
        found = {letter: range(main.count(letter), main.count(letter) + 1) for letter in dict.fromkeys(main)}
        for entry in self.layers:
            letter, least, most = _COUNTS.fullmatch(entry).groups()  # type: ignore[union-attr]
            held = main.count(letter)
            if int(most) > held:
                raise ConfigError(f"SearchConfig.layers is {entry!r}; expected at most the model's {held} of {letter}")
            found[letter] = range(int(least), int(most) + 1)
        return found

    def widths(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The values of each width that varies. Raises ConfigError for one that no layer reads, or that is larger than
        the model's."""
        found = {name: getattr(self, name) for name in WIDTHS if getattr(self, name)}
        for name, values in found.items():
            read = not WIDTHS[name] or set(WIDTHS[name]) & set(model.layers.main + model.layers.mtp)
            require(bool(read), self, name, "(): the model has no layer that reads it")
            held = getattr(model, name)
            require(held is not None and max(values) <= held, self, name, f"at most the model's {held}")
        return found
