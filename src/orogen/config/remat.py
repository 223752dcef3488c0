"""What a layer saves for its backward pass and what that pass recomputes, by the names of the layer's intermediates.

The outputs of matrix products and fused kernels have names, and so do other large arrays. A layer whose recomputation
is chosen by name saves its input and every named array that was not chosen, and nothing else: arrays without a name are
recomputed from these by elementwise operations.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.kinds import LAYERS, kind_of

# The names that every layer has; those of its mixer stand in the row of its kind.
COMMON = {
    "input": "the residual stream as it enters the layer; always kept, so only for offload",
    "norm": "the layer's normalised input, for this rank's piece of the sequence",
}

# Choices for a whole layer. What `selective` recomputes, intermediates that are large and cheap, is listed in
# config/kinds.py; for attention it is that of section 5 of arXiv:2205.05198.
WHOLE = ("none", "full", "elementwise")
# What `elementwise` saves by name: outputs of fused kernels, the largest array that a kernel reads again, the router's
# logits, since their product is three times as wide, and FP8's scales, each of which costs a pass over a tensor.
FUSED = ("attention", "router", "expert_activation", "fp8_scale")
BY_NAME = ("selective", "paper")
# Megatron's --recompute-modules.
MODULES = {
    "core_attn": {"core"},
    "moe_act": {"expert_activation"},
    "layernorm": {"norm"},
    "mla_up_proj": {"query", "key", "value"},
    "mlp": {"up", "activation"},
    "shared_experts": {"shared_up", "shared_activation", "shared_out"},
    "moe": {*LAYERS["E"].names},
}
MODULE_LETTERS = {"mla_up_proj": "+", "moe": "E"}


class Remat(NamedTuple):
    """What layers of one letter save for the backward pass.

    kind: `none` saves what autodiff saves, `full` only the input, `elementwise` the outputs of products and fused
    kernels, `names` all named arrays except `again`, which are recomputed. host: names of arrays that are offloaded to
    the host's memory, whether they would otherwise be saved or recomputed.
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
    """The names that layers of these letters have."""
    return list(dict.fromkeys([*COMMON, *(name for letter in letters for name in kind_of(letter).names)]))


def has(letter: str, name: str) -> bool:
    """Whether a layer of the letter has an intermediate of this name."""
    return name in COMMON or name in kind_of(letter).names


def layer_remat(remat: str | Sequence[str], offload: Sequence[str], letter: str) -> Remat:
    """What layers of `letter` keep, given valid values of PlanConfig.remat and .offload."""
    host = frozenset(name for name in offload if has(letter, name))
    found = _layer_remat(remat, letter)
    # Offloaded arrays are told from the rest by name.
    return found._replace(kind="names" if host and found.kind == "none" else found.kind, host=host)


def _layer_remat(remat: str | Sequence[str], letter: str) -> Remat:
    kind_of(letter)  # raises for a letter without a row
    chosen = [c for entry in _entries(remat) for c in entry.choices if letter in _applies(entry, c)]
    whole = [c for c in chosen if c in WHOLE]
    if whole:
        return Remat(whole[0])
    return Remat("names", frozenset().union(*(_again(c, letter) for c in chosen))) if chosen else Remat("none")


def check_remat(remat: str | Sequence[str]) -> None:
    """Raises ConfigError if an entry is unknown, names what its layers lack, or contradicts another."""
    known = [*WHOLE, *BY_NAME, *(name for name in names_of(LAYERS) if name != "input"), *MODULES]
    for entry in _entries(remat):
        for choice in entry.choices:
            if choice not in known:
                raise _refusal(remat, f"one of {', '.join(known)}, not {choice!r}")
        for letter in entry.letters:
            if letter not in LAYERS:
                raise _refusal(remat, f"letters of {''.join(LAYERS)} before the colon, not {letter!r}")
            for choice in entry.choices:
                if letter not in _letters(choice):
                    names = ", ".join(name for name in names_of(letter) if name != "input")
                    raise _refusal(remat, f"one of {names} for layers {letter}, not {choice!r}")
    for letter in LAYERS:
        chosen = {c for entry in _entries(remat) for c in entry.choices if letter in _applies(entry, c)}
        if chosen & set(WHOLE) and len(chosen) > 1:
            raise _refusal(remat, f"one choice for layers {letter}, not {' and '.join(sorted(chosen))}")


def check_offload(offload: Sequence[str]) -> None:
    """Raises ConfigError if an entry is not a name of an intermediate."""
    for name in offload:
        if name not in names_of(LAYERS):
            raise _refusal(offload, f"some of {', '.join(names_of(LAYERS))}, not {name!r}", "offload")


def check_layers(field: str, value: str | Sequence[str], letters: str) -> None:
    """Raises ConfigError if an entry of PlanConfig.`field` names nothing that a model of these layers has."""
    for entry in _entries(value):
        for choice in entry.choices:
            missing = sorted(set(entry.letters) - set(letters))
            if missing or not set(_applies(entry, choice)) & set(letters):
                what = f"layers {missing[0]}" if missing else repr(choice)
                names = ", ".join(name for name in names_of(letters) if name != "input" or field == "offload")
                have = "".join(letter for letter in LAYERS if letter in letters)
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
    if choice in MODULE_LETTERS:
        return MODULE_LETTERS[choice]
    if choice in (*WHOLE, *BY_NAME):
        return "".join(LAYERS)
    names = MODULES.get(choice, {choice})
    return "".join(letter for letter in LAYERS if any(has(letter, name) for name in names))


def _applies(entry: Entry, choice: str) -> str:
    """The letters to which this choice of the entry applies."""
    return "".join(letter for letter in _letters(choice) if not entry.letters or letter in entry.letters)


def _again(choice: str, letter: str) -> set[str]:
    """The names that a choice recomputes in layers of `letter`."""
    if choice in BY_NAME:
        return {*kind_of(letter).selective} if choice == "selective" else set()
    return {name for name in MODULES.get(choice, {choice}) if has(letter, name)}
