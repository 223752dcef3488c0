"""What a layer keeps for its backward pass, and what that pass recomputes, by the names of the layer's intermediates.

The outputs of matrix products and fused kernels have names, and so do large arrays. A layer whose recomputation is
chosen by name keeps its input and every named array that was not chosen; arrays without a name are recomputed from
these by elementwise work. So a layer keeps named arrays only.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.pattern import LAYERS

SEEING, EVERY = "*w+x", "".join(LAYERS)


class Intermediate(NamedTuple):
    """The letters of the layers that have it, and what it is."""

    letters: str
    holds: str


# Several arrays of one kind in a layer share a name.
NAMES = {
    "input": Intermediate(EVERY, "the residual stream as it enters the layer; always kept, so only for offload"),
    "norm": Intermediate(EVERY, "the layer's normalised input, for this rank's piece of the sequence"),
    "query": Intermediate(SEEING, "queries as projected, before their norm and rotation"),
    "key": Intermediate(SEEING, "keys as projected, of `x` those of its images"),
    "value": Intermediate(SEEING, "values as projected, of `x` those of its images"),
    "latent": Intermediate("+E", "the outputs of projections into a latent: MLA's, and a latent MoE's"),
    "core": Intermediate(SEEING, "the softmax's output in the compute dtype, with the implementation `full`"),
    "attention": Intermediate(SEEING, "the attention core's output, and log-sum-exps of a fused or ring core"),
    "in_proj": Intermediate("Mm", "the projections of the input: gate, x, and of Mamba-2 B, C and dt"),
    "conv": Intermediate("Mm", "the convolutions' outputs, activated"),
    "ssd": Intermediate("M", "what other tokens contribute to the SSD's outputs; with `triton` the whole outputs"),
    "ssd_states": Intermediate("M", "the states that enter the chunks"),
    "gated_norm": Intermediate("M", "the gated norm's output"),
    "x_proj": Intermediate("m", "the time step, B and C as projected from x"),
    "scan": Intermediate("m", "the selective scan's output"),
    "scan_states": Intermediate("m", "the states that enter its chunks"),
    "gated": Intermediate("m", "the scan's output times the gate"),
    "up": Intermediate("-g", "the hidden units before the activation, those of a gate too"),
    "activation": Intermediate("-g", "the hidden units"),
    "branch": Intermediate("xg", "the output before it is multiplied by the tanh of its gate"),
    "router": Intermediate("E", "the router's logits, float32"),
    "routing": Intermediate("E", "where assignments go: experts, positions in the exchange, group sizes"),
    "rows": Intermediate("E", "tokens permuted and sent to this rank's experts"),
    "expert_up": Intermediate("E", "the experts' hidden units before the activation"),
    "expert_activation": Intermediate("E", "the experts' hidden units"),
    "expert_out": Intermediate("E", "the experts' outputs, sent back to the ranks that weight them"),
    "combined": Intermediate("E", "the weighted sums of the experts' outputs"),
    "shared_up": Intermediate("E", "the shared expert's hidden units before the activation"),
    "shared_activation": Intermediate("E", "the shared expert's hidden units"),
    "shared_out": Intermediate("E", "the shared expert's output and its gate, if it has one"),
}

# Choices for a whole layer, and what `selective` recomputes: large and cheap intermediates. For attention that is
# section 5 of arXiv:2205.05198.
WHOLE = ("none", "full", "elementwise")
# What `elementwise` keeps by name: outputs of fused kernels, the largest array that a kernel reads again, the router's
# logits, since their product is three times as wide, and FP8's scales, each of which costs a pass over a tensor.
FUSED = ("attention", "router", "expert_activation", "fp8_scale")
BY_NAME = ("selective", "paper")
SELECTIVE = {
    **dict.fromkeys(SEEING, {"core"}),
    "M": {"conv", "ssd", "ssd_states", "gated_norm"},
    "m": {"conv", "scan", "scan_states", "gated"},
    "E": {"expert_activation", "shared_activation"},
}

# Megatron's --recompute-modules.
MODULES = {
    "core_attn": {"core"},
    "moe_act": {"expert_activation"},
    "layernorm": {"norm"},
    "mla_up_proj": {"query", "key", "value"},
    "mlp": {"up", "activation"},
    "shared_experts": {"shared_up", "shared_activation", "shared_out"},
    "moe": {name for name, (letters, _) in NAMES.items() if letters == "E"} | {"latent"},
}
MODULE_LETTERS = {"mla_up_proj": "+", "moe": "E"}


class Remat(NamedTuple):
    """What layers of one type keep.

    kind: `none` keeps what autodiff keeps, `full` only the input, `elementwise` the outputs of products and fused
    kernels, `names` all names except `again`, which are recomputed. host: names that are offloaded to the host's
    memory, whether they would otherwise be kept or recomputed.
    """

    kind: str
    again: frozenset[str] = frozenset()
    host: frozenset[str] = frozenset()

    def keeps(self, name: str) -> bool:
        """Whether the intermediate is kept for the backward pass and not recomputed."""
        if self.kind == "names":
            return name not in self.again and name != "input"  # the input is an argument, and kept anyway
        return self.kind == "none" or (self.kind == "elementwise" and name in FUSED)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of PlanConfig.remat: letters ("" for every layer that has what is chosen) and what is chosen."""

    letters: str
    choices: tuple[str, ...]


def names_of(letters: Iterable[str]) -> list[str]:
    """The names that a layer of any of these letters has, in the order of NAMES."""
    return [name for name, known in NAMES.items() if set(known.letters) & set(letters)]


def layer_remat(remat: str | Sequence[str], offload: Sequence[str], letter: str) -> Remat:
    """What layers of `letter` keep, given valid values of PlanConfig.remat and .offload."""
    host = frozenset(name for name in offload if letter in NAMES[name].letters)
    found = _layer_remat(remat, letter)
    # Offloaded arrays are told from the rest by name.
    return found._replace(kind="names" if host and found.kind == "none" else found.kind, host=host)


def _layer_remat(remat: str | Sequence[str], letter: str) -> Remat:
    chosen = [c for entry in _entries(remat) for c in entry.choices if letter in _applies(entry, c)]
    whole = [c for c in chosen if c in WHOLE]
    if whole:
        return Remat(whole[0])
    return Remat("names", frozenset().union(*(_again(c, letter) for c in chosen))) if chosen else Remat("none")


def check_remat(remat: str | Sequence[str]) -> None:
    """Raises ConfigError if an entry is unknown, names what its layers lack, or contradicts another."""
    known = [*WHOLE, *BY_NAME, *(name for name in NAMES if name != "input"), *MODULES]
    for entry in _entries(remat):
        for choice in entry.choices:
            if choice not in known:
                raise _refusal(remat, f"one of {', '.join(known)}, not {choice!r}")
        for letter in entry.letters:
            if letter not in EVERY:
                raise _refusal(remat, f"letters of {EVERY} before the colon, not {letter!r}")
            for choice in entry.choices:
                if letter not in _letters(choice):
                    names = ", ".join(name for name in names_of(letter) if name != "input")
                    raise _refusal(remat, f"one of {names} for layers {letter}, not {choice!r}")
    for letter in EVERY:
        chosen = {c for entry in _entries(remat) for c in entry.choices if letter in _applies(entry, c)}
        if chosen & set(WHOLE) and len(chosen) > 1:
            raise _refusal(remat, f"one choice for layers {letter}, not {' and '.join(sorted(chosen))}")


def check_offload(offload: Sequence[str]) -> None:
    """Raises ConfigError if an entry is not a name of an intermediate."""
    for name in offload:
        if name not in NAMES:
            raise _refusal(offload, f"some of {', '.join(NAMES)}, not {name!r}", "offload")


def check_layers(field: str, value: str | Sequence[str], letters: str) -> None:
    """Raises ConfigError if an entry of PlanConfig.`field` names nothing that a model of these layers has."""
    for entry in _entries(value):
        for choice in entry.choices:
            missing = sorted(set(entry.letters) - set(letters))
            if missing or not set(_applies(entry, choice)) & set(letters):
                what = f"layers {missing[0]}" if missing else repr(choice)
                names = ", ".join(name for name in names_of(letters) if name != "input" or field == "offload")
                have = "".join(letter for letter in EVERY if letter in letters)
                raise _refusal(value, f"names that the model's layers {have} have ({names}), not {what}", field)


def _refusal(value: Any, expected: str, field: str = "remat") -> ConfigError:
    return ConfigError(f"PlanConfig.{field} is {value!r}; expected {expected}")


def _entries(remat: str | Sequence[str]) -> list[Entry]:
    entries = []
    for text in (remat,) if isinstance(remat, str) else remat:
        letters, _, names = text.rpartition(":")
        entries.append(Entry(letters, tuple(name.strip() for name in names.split(","))))
    return entries


def _letters(choice: str) -> str:
    """The letters of the layers to which a choice applies."""
    if choice in MODULES:
        letters = {letter for name in MODULES[choice] for letter in NAMES[name].letters}
        return MODULE_LETTERS.get(choice) or "".join(letter for letter in EVERY if letter in letters)
    return NAMES[choice].letters if choice in NAMES else EVERY


def _applies(entry: Entry, choice: str) -> str:
    """The letters to which this choice of the entry applies."""
    return "".join(letter for letter in _letters(choice) if not entry.letters or letter in entry.letters)


def _again(choice: str, letter: str) -> set[str]:
    """The names that a choice recomputes in layers of `letter`."""
    if choice in BY_NAME:
        return SELECTIVE.get(letter, set()) if choice == "selective" else set()
    return {name for name in MODULES.get(choice, {choice}) if letter in NAMES[name].letters}
