"""What an engine makes of a model before it runs: its layers, its shapes, and which tokens it may choose."""

import dataclasses

import numpy as np

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.engine import KEPT, SCALED, UNSCALED, EngineConfig
from orogen.config.quantize import ATTENTION
from orogen.config.recipe import Recipe, Scales, Stored
from orogen.infer.buckets import Buckets, Parts
from orogen.infer.knobs import check_ids
from orogen.infer.request import Request
from orogen.infer.sizes import Sizes
from orogen.model.lm import written_out
from orogen.model.slots import FEW


def prepared(opened: Opened, config: EngineConfig, *, release: bool) -> Opened:
    """The model as the engine runs it."""
    recipes = stored_recipes(opened, config)
    plan = dataclasses.replace(opened.plan, decode_kernels=config.kernels, recipes=recipes)
    if not config.written_out:
        return opened._replace(plan=plan)
    states = opened.params, opened.buffers
    built, (params, buffers) = written_out(opened.config, opened.built, *states, release=release)
    return opened._replace(plan=plan, built=built, params=params, buffers=buffers)


def stored_recipes(opened: Opened, config: EngineConfig) -> tuple[Recipe, ...]:
    """The recipes of all layers, with what the config says of keys, values and states. Raises ConfigError if the
    checkpoint lacks the scales, or has others than it should."""
    assert opened.plan.recipes is not None, "the plan of a whole model has a recipe for each layer"
    layers, random = opened.config.layers, config.state_rounding == "stochastic"

    def scales(number: int, letter: str) -> Scales | None:
        if config.key_values == KEPT or letter not in ATTENTION:
            return None
        if config.key_values == UNSCALED or number >= len(layers.main):
            return 1.0, 1.0
        found = opened.cache_scales[number] if opened.cache_scales else None
        if found is None:
            raise ConfigError(
                f"EngineConfig.key_values is {SCALED!r}; expected a checkpoint with k_scale and v_scale for layer "
                f"{number}, as `orogen quantize` writes them with QuantizeConfig.key_values = 'fp8', or {UNSCALED!r}"
            )
        if isinstance(found, str):
            raise ConfigError(f"EngineConfig.key_values is {SCALED!r}, and {found}, or {UNSCALED!r}")
        return found

    every = enumerate(zip(layers.main + layers.mtp, opened.plan.recipes, strict=True))
    return tuple(
        dataclasses.replace(recipe, stored=Stored(key_values=scales(number, letter), random_states=random))
        for number, (letter, recipe) in every
    )


def buckets_of(opened: Opened, config: EngineConfig, sizes: Sizes) -> Buckets:
    """The shapes of its programs."""
    layers = opened.config.layers
    latent = "+" in layers.main + (layers.mtp if config.drafter == "mtp" else "")
    by_kernel = config.kernels == "triton" and not latent and not config.exact and sizes.drafts < FEW
    tensor, context = (opened.plan.size(axis) for axis in ("tensor", "context"))
    # A convolution, of the MTP block too, reads no further back than into the part before.
    least = max(1, opened.config.taps - 1)
    parts = Parts(2 * context, least) if context > 1 else Parts(1, 1)
    return Buckets(config, sizes, tensor=tensor, parts=parts, tables_cost_nothing=by_kernel)


def is_token(opened: Opened) -> np.ndarray:
    """(v,) whether a token may be chosen: rows of the vocabulary beyond the tokenizer's stand for nothing."""
    is_token_v = np.ones(opened.config.vocab_size, bool)
    if opened.tokenizer is not None:
        is_token_v[:] = False
        is_token_v[: opened.tokenizer.vocab_size] = opened.tokenizer.is_token_v
    return is_token_v


def check_request(request: Request, opened: Opened, is_token_v: np.ndarray, *, length: int) -> None:
    """Raises ConfigError for tokens that the model does not have, or more of them than `length`."""
    size = opened.config.vocab_size
    wrong = [i for i in (*request.prompt, *request.stop_ids) if not 0 <= i < size]
    if wrong:
        raise ConfigError(f"token id {wrong[0]}; expected 0 to {size - 1}")
    known = is_token_v[np.array(request.prompt)]
    if not known.all():
        raise ConfigError(f"token id {request.prompt[known.argmin()]}; expected one that the tokenizer has")
    check_ids(request, size)
    if len(request.prompt) + request.max_tokens > length:
        raise ConfigError(
            f"a prompt of {len(request.prompt)} tokens and max_tokens={request.max_tokens}; expected at most "
            f"{length} in all"
        )
    if request.stop and opened.tokenizer is None:
        raise ConfigError("Request.stop without a tokenizer; expected token ids in stop_ids")
