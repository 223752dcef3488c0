"""The layer pattern of a model, and how it is read."""

import dataclasses
import functools

from orogen.config.checks import ConfigError
from orogen.config.kinds import LAYERS, listed

# What a model has beside the layers of its backbone.
MODEL_PARTS = ("embedding", "head", "norm", "mtp", "resampler", "score")
MAX_LAYERS = 1024  # the deepest trained models have 1,000; the time to fold a pattern grows with its square


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A parsed layer pattern.

    main: one letter per residual layer; segments: the same letters, split at `|` into pipeline segments;
    mtp: the letters of the multi-token-prediction block ("" without one); mtp_parts: how many times it is written.
    """

    main: str
    segments: tuple[str, ...]
    mtp: str
    mtp_parts: int


@functools.lru_cache(maxsize=1024)
def parse_pattern(text: str) -> Pattern:
    """Reads `main("|"main)*("/"mtp)*`, Megatron's hybrid layer pattern. A segment may be empty.

    `MEM*E/*E/*E` is five layers and one block `*E` applied at two depths. Raises ConfigError on an unknown letter,
    an empty main pattern, an empty or differing part after `/`, or a `|` after `/`.
    """
    main, *parts = text.split("/")
    for what, count in (("layers", len(main) - main.count("|")), ("parts", 1 + main.count("|") + len(parts))):
        if count > MAX_LAYERS:
            raise ConfigError(f"ModelConfig.pattern has {count:,} {what}; expected at most {MAX_LAYERS:,}")
    unknown = sorted(set(text) - set(LAYERS) - set("|/"))
    if unknown:
        raise ConfigError(
            f"ModelConfig.pattern is {text!r}: unknown letter {unknown[0]!r}; expected {listed(LAYERS)}, | or /"
        )
    layers = main.replace("|", "")
    if not layers:
        raise ConfigError(f"ModelConfig.pattern is {text!r}; expected at least one layer before any /")
    if len(set(parts)) > 1 or any(not part or "|" in part for part in parts):
        raise ConfigError(
            f"ModelConfig.pattern is {text!r}; expected the parts after / to be equal, not empty, without |"
        )
    return Pattern(layers, tuple(main.split("|")), parts[0] if parts else "", len(parts))
