"""Residual layers, and stacks of them that repeat under `lax.scan`.

Letters: b batch, t time, d model.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from orogen.config.kinds import kind_of, resolved
from orogen.config.lora import AdaptedModel
from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU
from orogen.config.recipe import FP8
from orogen.layers.adapter import adapt
from orogen.layers.documents import Documents
from orogen.layers.norm import make_norm
from orogen.layers.probe import Seen, change, probe_of, stream_squares
from orogen.model.remat import checkpointed
from orogen.parallel.plan import Plan


def mixer_of(letter: str, config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The mixer that a letter of the pattern stands for. Raises ConfigError if it stands for none."""
    return resolved(kind_of(letter).mixer)(config, rngs)


class Repeat(NamedTuple):
    """`items` (letters and Repeats) one after another, `count` times."""

    items: "Items"
    count: int


Items = tuple[str | Repeat, ...]


class _Folded(NamedTuple):
    """Items of a part of the pattern, and how many distinct layers they have in total."""

    distinct: int
    items: Items


@functools.cache
def repeats(pattern: str) -> Items:
    """`pattern` folded into nested repetitions with the fewest distinct layers in total, so the least to compile.

    `MEM*MEM*E` becomes (Repeat((M, E, M, *), 2), E); 52 layers of Nemotron 3 Nano become 10.
    """

    @functools.cache
    def best(start: int, end: int) -> _Folded:
        """pattern[start:end] with the fewest distinct layers. Each result is built from those of later starts."""
        if start == end:
            return _Folded(0, ())
        rest = best(start + 1, end)
        found = _Folded(1 + rest.distinct, (pattern[start], *rest.items))
        for middle in range(start + 1, end + 1):
            if (first := repeated(start, middle)) is not None:
                rest = best(middle, end)
                if first.distinct + rest.distinct < found.distinct:
                    found = _Folded(first.distinct + rest.distinct, first.items + rest.items)
        return found

    @functools.cache
    def repeated(start: int, end: int) -> _Folded | None:
        """pattern[start:end] as one Repeat of its shortest period; None if it has no period."""
        text = pattern[start:end]
        period = (text + text).find(text, 1)
        if period == len(text):
            return None
        once = from_end(start, start + period)
        return _Folded(once.distinct, (Repeat(once.items, len(text) // period),))

    def from_end(start: int, end: int) -> _Folded:
        """`best` after the results of all later starts, which it then finds cached: recursion stays shallow."""
        for later in range(end, start, -1):
            best(later, end)
        return best(start, end)

    return from_end(0, len(pattern)).items


class Place(NamedTuple):
    """Where a layer is in a Stack: the child to take at each level, and the index in each repetition on the way."""

    path: tuple[int, ...]
    index: tuple[int, ...]


def places(items: Items) -> list[Place]:
    """The place of every layer, in the order of the pattern."""
    found = []
    for number, item in enumerate(items):
        if isinstance(item, str):
            found.append(Place((number,), ()))
        else:
            inner = places(item.items)
            found += [Place((number, *p.path), (turn, *p.index)) for turn in range(item.count) for p in inner]
    return found


def letters(items: Items) -> str:
    """The pattern that was folded into `items`."""
    return "".join(item if isinstance(item, str) else letters(item.items) * item.count for item in items)


class Layer(nnx.Module):
    """x + mixer(norm(x)), for one letter of the pattern."""

    def __init__(self, letter: str, config: ModelConfig, rngs: nnx.Rngs):
        self.letter = letter
        self.norm = make_norm(config)
        self.mixer: Any = mixer_of(letter, config, rngs)
        if isinstance(config, AdaptedModel):
            adapt(self.mixer, letter, config.lora, rngs)

    def __call__(self, x_btd: Array, docs: Documents, plan: Plan, given: Any = None) -> tuple[Array, Any]:
        """The residual stream after this layer, and what its mixer keeps; given a probe, statistics instead."""
        with jax.named_scope(type(self.mixer).__name__):
            with jax.named_scope("norm"):
                h_btd = checkpoint_name(self.norm(checkpoint_name(x_btd, "input"), plan), "norm")
            y_btd, kept = self.mixer(h_btd, docs, plan, given)
        probe, _ = probe_of(given)
        if probe is None:
            return x_btd + y_btd, kept
        after_btd = x_btd + (y_btd if probe.gain is None else y_btd * probe.gain.astype(y_btd.dtype))
        if not probe.measures:
            return after_btd, Seen(kept, after_btd) if probe.streams else None
        of_stream = {"hidden": stream_squares(h_btd, docs, plan), "change": change(x_btd, after_btd, docs, plan)}
        return after_btd, {**of_stream, **kept}

    def start(self, allocator: Any, dtype: Any) -> Any:
        """What the mixer is `given` with the first piece of a sequence; see `Stack.start`."""
        return self.mixer.start(allocator, dtype)

    def cache_axes(self, allocator: Any) -> Any:
        """The logical axes of what `start` makes."""
        return self.mixer.cache_axes(allocator)


class Stack(nnx.Module):
    """Layers in order. A repetition is one child whose arrays have a leading axis, scanned over.

    State enters and leaves layers as two trees of one form: a tuple with one entry per child. For a layer, the entry is
    whatever its mixer takes or keeps (None if nothing); for a repetition, a nested tuple stacked along the leading
    axis. `given` goes in: routing to replay, caches of earlier tokens, probes (`layers/probe.py`). A call returns the
    residual stream and what the layers `kept`: routing statistics, each given cache with this call's tokens added, or
    the statistics that a probe requests. The plan has a recipe for each layer, and possibly for layers after these.
    """

    def __init__(self, items: Items, config: ModelConfig, rngs: nnx.Rngs):
        self.items, self.size = items, len(letters(items))
        self.children: Any = nnx.List([_child(item, config, rngs) for item in items])

    def __call__(self, x_btd: Array, docs: Documents, plan: Plan, given: Any = None) -> tuple[Array, Any]:
        kept, start = [], 0
        for index, (item, child) in enumerate(zip(self.items, self.children, strict=True)):
            child_given = None if given is None else given[index]
            apply: Any = _scan if isinstance(item, Repeat) else _apply
            stop = start + len(letters((item,)))
            x_btd, child_kept = apply(child, x_btd, docs, plan.of_layers(start, stop), child_given)
            kept.append(child_kept)
            start = stop
        return x_btd, tuple(kept)

    def start(self, allocator: Any, dtype: Any) -> tuple[Any, ...]:
        """What the layers are `given` with the first piece of each sequence: empty caches of this device's heads and
        channels, in the form that the allocator decides (`cache.Rows`, `slots.Slots`), with activations in `dtype`.
        Each later piece is given `caches` of what the layers kept."""
        started = []
        for item, child in zip(self.items, self.children, strict=True):
            empty = child.start(allocator, dtype)
            if isinstance(item, Repeat):
                empty = jax.tree.map(lambda a, n=item.count: jnp.broadcast_to(a, (n, *a.shape)), empty)
            started.append(empty)
        return tuple(started)

    def cache_axes(self, allocator: Any) -> tuple[Any, ...]:
        """The logical axes of what `start` makes, without the axes that repetitions put in front."""
        return tuple(child.cache_axes(allocator) for child in self.children)


def _child(item: str | Repeat, config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """A Layer, or for a repetition one Stack whose arrays are stacked along a leading axis."""
    if isinstance(item, str):
        return Layer(item, config, rngs)

    graphs = []

    def build(key: Array) -> nnx.State:
        graph, state = nnx.split(Stack(item.items, config, nnx.Rngs(key)))
        graphs.append(graph)  # static, so vmap cannot return it; a second trace would double the work at each level
        return state

    states = jax.vmap(build)(jax.random.split(rngs.params(), item.count))
    return nnx.merge(graphs[0], states)


def _apply(layer: Layer, x_btd: Array, docs: Documents, plan: Plan, given: Any) -> tuple[Array, Any]:
    """One layer under its remat policy."""
    graph, state = nnx.split(layer)
    plan = plan.of_layer()

    def call(state, x_btd, docs, given):
        return nnx.merge(graph, state)(x_btd, docs, plan, given)

    remat = plan.config.layer_remat(layer.letter)
    # FSDP gathers weights and FP8 rounds them; `elementwise` saves the rounded ones if a kernel makes them.
    kept = remat.kind == "elementwise" and plan.config.quantize == FOR_GPU["quantize"]
    large = plan.config.fsdp == "parameters" or (FP8 in plan.recipe.names() and not kept)
    return checkpointed(call, remat, weights_behind=large)(state, x_btd, docs, given)


def _scan(stack: Stack, x_btd: Array, docs: Documents, plan: Plan, given: Any) -> tuple[Array, Any]:
    """The repetitions of a stack, one after another; given, and what they keep, are stacked along a leading axis."""
    graph, states = nnx.split(stack)
    count = len(jax.tree.leaves(states)[0])
    turns = [plan.of_layers(turn * stack.size, (turn + 1) * stack.size) for turn in range(count)]

    def body(x_btd, inputs, plan=turns[0]):
        state, given, each = inputs
        return nnx.merge(graph, state)(x_btd, docs, plan.with_each(each), given)

    by_turn = lambda a: a.reshape(count, stack.size, *a.shape[1:])  # noqa: E731
    each = (None, None) if plan.rounding is None else jax.tree.map(by_turn, plan.rounding.each)
    if len({turn.recipes for turn in turns}) > 1:
        # Unrolled, since some turns have other recipes: a loop over the rest would first copy their weights out.
        kept = []
        for index, turn in enumerate(turns):
            inputs = jax.tree.map(lambda a, index=index: a[index], (states, given, each))
            x_btd, turn_kept = body(x_btd, inputs, turn)
            kept.append(turn_kept)
        return x_btd, jax.tree.map(lambda *parts: jnp.stack(parts), *kept)
    return lax.scan(body, x_btd, (states, given, each), unroll=count <= plan.config.unroll)
