"""A model split into the segments of a pipeline: how its layers are laid out over the stages, and joined again.

A stage keeps its layers by letter, one array per parameter, with three leading axes: (stage, chunk, row). A chunk with
fewer layers of a letter than the fullest chunk has rows of zeros, which nothing reads. Embedding and head are one array
if no stage needs both: stage 0 holds the embedding in its row, the last stage the head. Otherwise each is on every
stage, as are the final norm and the MTP block's own parameters.

Letters: p stages, v chunks per stage, r rows, m microbatches, b batch, t time, k experts per token, l layers,
e experts, n tokens of the vocabulary, d model.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from orogen.config.recipe import Recipe
from orogen.model.block import repeats
from orogen.model.by_letter import ByLetter, Items, add_rows, by_letter, concatenated, joined, plain, stacked, state_of
from orogen.moe.layer import Choice, Replay
from orogen.parallel.axes import TOKENS
from orogen.parallel.plan import Plan
from orogen.parallel.rounding_state import PROBES

BACKBONE, MTP, LAYERS = "backbone", "mtp", "layers"
EMBEDDING, HEAD, VOCABULARY, WEIGHT, RESAMPLER = "embedding", "head", "vocabulary", "weight", "resampler"
MOE, CROSS = "E", "x"


class Segment(NamedTuple):
    """A contiguous part of the pattern. The first segment embeds tokens; the last has the heads, and the MTP block's
    layers `mtp`. recipes: of its own layers, then of the MTP block's; None where they do not matter."""

    pattern: str
    mtp: str
    first: bool
    last: bool
    recipes: tuple[Recipe, ...] | None = None

    def uses(self, name: str, *, tied: bool) -> bool:
        """Whether it computes with the model's part `name`; tied: the embedding is also the head."""
        if name == EMBEDDING:
            return self.first or (self.last and (tied or bool(self.mtp)))
        if name == RESAMPLER:
            return CROSS in self.pattern
        return self.last or name in (BACKBONE, PROBES)

    @property
    def items(self) -> tuple[Items, Items]:
        """Its two stacks, of the backbone's layers and of the MTP block's."""
        return repeats(self.pattern), repeats(self.mtp)


@dataclasses.dataclass(frozen=True)
class Stages:
    """The layers of each segment of a pipeline; segment g is chunk g // stages of stage g % stages. The last segment
    also has the MTP block's layers, after its own."""

    patterns: tuple[str, ...]
    mtp: str
    stages: int

    @property
    def virtual(self) -> int:
        """Chunks per stage."""
        return len(self.patterns) // self.stages

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Every segment, in the order of the pattern."""
        last = len(self.patterns) - 1
        return tuple(
            Segment(pattern, self.mtp if g == last else "", g == 0, g == last)
            for g, pattern in enumerate(self.patterns)
        )

    def kinds(self, recipes: tuple[Recipe, ...] | None) -> tuple[Segment, ...]:
        """The distinct segments, by layers and their `recipes`: chunks of equal segments run the same program."""
        return tuple(dict.fromkeys(self._with_recipes(recipes)))

    def kind_vp(self, recipes: tuple[Recipe, ...] | None) -> np.ndarray:
        """(v, p) int: the index in `kinds` of chunk v of stage p."""
        kinds = self.kinds(recipes)
        return np.reshape([kinds.index(s) for s in self._with_recipes(recipes)], (self.virtual, self.stages))

    @functools.cached_property
    def start_vp(self) -> np.ndarray:
        """(v, p) int: the number along the pattern of the first layer of chunk v of stage p."""
        return np.reshape(np.cumsum([0, *map(len, self.patterns[:-1])]), (self.virtual, self.stages))

    @property
    def chunks(self) -> list[tuple[str, str]]:
        """The patterns of backbone and MTP block for each chunk."""
        return [(segment.pattern, segment.mtp) for segment in self.segments]

    @property
    def segmented(self) -> tuple[str, ...]:
        """The pattern's segments, for a description of the plan."""
        return self.patterns

    @property
    def filled(self) -> dict[str, float]:
        """The share of the rows of all stages that hold a layer, by letter."""
        layers = "".join(self.patterns) + self.mtp
        return {letter: layers.count(letter) / self._index(letter, 1).size for letter in set(layers)}

    def split(self, state: nnx.State) -> nnx.State:
        """Parameters or buffers of a whole model as the stages keep them."""
        shared, stacks = _apart(state, self._items)
        if HEAD in shared and self.stages > 1 and not self.mtp:
            shared = _paired(shared, self.stages)
        layers = {letter: _marked(tree, staged=True) for letter, tree in self.split_rows(stacks).items()}
        return nnx.State({**shared, **({LAYERS: layers} if layers else {})})

    def join(self, state: nnx.State) -> nnx.State:
        """The inverse of `split`."""
        parts = _unpaired(plain(state), self.stages - 1)
        shared = {name: part for name, part in parts.items() if name != LAYERS}
        layers = {letter: _marked(tree, staged=False) for letter, tree in parts.get(LAYERS, {}).items()}
        return _together(shared, self.join_rows(layers), self._items)

    def split_rows(self, stacks: Sequence[ByLetter], *, lead: int = 0) -> ByLetter:
        """(p, v, r, …) by letter, from the rows, along axis `lead`, of the backbone's stack and of the MTP block's. The
        latter may be repeated, once per depth: the last chunk then has its layers that many times."""
        depths, found = len(stacks) - 1, {}
        for letter in sorted(frozenset().union(*stacks)):
            trees = [stack[letter] for stack in stacks if letter in stack]
            index_pvr = self._index(letter, depths)
            found[letter] = jax.tree.map(functools.partial(_lay_out, index_pvr, lead), *trees)
        return found

    def join_rows(self, laid: ByLetter, *, depths: int = 1, lead: int = 0) -> list[ByLetter]:
        """The inverse of `split_rows`."""
        stacks: list[ByLetter] = [{} for _ in range(1 + depths)]
        for letter, tree in laid.items():
            row_n = np.argsort(self._index(letter, depths).ravel(), kind="stable")
            start = 0
            for stack, pattern in zip(stacks, ["".join(self.patterns)] + [self.mtp] * depths, strict=True):
                if count := pattern.count(letter):
                    take = functools.partial(_pick, row_n[start : start + count], lead)
                    stack[letter], start = jax.tree.map(take, tree), start + count
        return stacks

    def layer(self, state: nnx.State, number: int) -> nnx.State:
        """The parameters or buffers of one layer, counted along the pattern, with the MTP block's layers last."""
        layers = "".join(self.patterns) + self.mtp
        letter = layers[number]
        index = tuple(np.argwhere(self._index(letter, 1) == layers[:number].count(letter))[0])
        found = plain(state).get(LAYERS, {}).get(letter, {})
        return nnx.State(jax.tree.map(lambda a: a[index], _marked(found, staged=False)))

    def loads(self, load: Sequence[Array]) -> Array:
        """(l, e): the routers' counters, in the order of the pattern, with the MTP block's last; see `Sums`."""
        found = [stack[MOE] for stack in self.join_rows(dict.fromkeys((MOE,), *load) if load else {}) if stack]
        return jnp.concatenate(found) if found else jnp.zeros((0, 0))

    def load_specs(self, plan: Plan) -> Any:
        """The PartitionSpec of these counters."""
        return plan.spec("stage")

    def choice_specs(self, plan: Plan, depths: int) -> Any:
        """PartitionSpecs of routers' choices (p, v, r, m, b, t, …); () if no experts run."""
        if MOE not in "".join(self.patterns) + self.mtp * (depths > 0):
            return ()
        token: Any = plan.spec("stage", None, None, None, *TOKENS)
        each: Any = plan.spec("stage", None, None, None, *TOKENS, None)
        return Choice(Replay(each, each), token, token)

    def split_replay(self, replay: tuple[Any, ...]) -> Any:
        """Replays (m, …, b, t, k) of the whole model's stacks, in the form of the stages, (p, v, r, m, b, t, k); () for
        a model without experts."""
        main, deeper = self._items
        items = [main] + [deeper] * (len(replay) - 1)
        stacks: list[ByLetter] = [by_letter(tree, part, lead=1) for tree, part in zip(replay, items, strict=True)]
        return self.split_rows(stacks, lead=1).get(MOE, ())

    def _with_recipes(self, recipes: tuple[Recipe, ...] | None) -> list[Segment]:
        """The segments, each with its layers' part of `recipes`, which are the whole model's."""
        if recipes is None:
            return list(self.segments)
        stops = np.cumsum([len(s.pattern + s.mtp) for s in self.segments])
        return [
            segment._replace(recipes=recipes[stop - len(segment.pattern + segment.mtp) : stop])
            for segment, stop in zip(self.segments, stops, strict=True)
        ]

    @property
    def _items(self) -> tuple[Items, Items]:
        return repeats("".join(self.patterns)), repeats(self.mtp)

    def _index(self, letter: str, depths: int) -> np.ndarray:
        """(p, v, r) int: the layer that each row holds, counted among all layers of this letter; the number of these if
        the row holds none."""
        counts = [s.pattern.count(letter) + depths * s.mtp.count(letter) for s in self.segments]
        starts = np.cumsum([0, *counts])
        index_gr = np.full((len(counts), max(counts)), starts[-1])
        for row_r, start, count in zip(index_gr, starts, counts, strict=False):
            row_r[:count] = start + np.arange(count)
        return index_gr.reshape(self.virtual, self.stages, -1).swapaxes(0, 1)


def take(state: nnx.State, segment: Segment, chunk: Array) -> nnx.State:
    """A segment's parameters or buffers, in the form of a model with only these layers. state: this device's stage;
    chunk: int32, which of its chunks the segment is."""

    def of_chunk(a: Array) -> Array:
        """(r, …); a stage's only chunk is not copied."""
        return a[0, 0] if a.shape[1] == 1 else lax.dynamic_index_in_dim(a[0], chunk, keepdims=False)

    parts, stacks = _unpaired(plain(state), 0), [{}, {}]
    for letter, tree in parts.get(LAYERS, {}).items():
        rows_r, start = jax.tree.map(of_chunk, _marked(tree, staged=False)), 0
        for stack, pattern in zip(stacks, (segment.pattern, segment.mtp), strict=True):
            if count := pattern.count(letter):
                part = functools.partial(lax.slice_in_dim, start_index=start, limit_index=start + count)
                stack[letter], start = jax.tree.map(part, rows_r), start + count
    shared = {name: part for name, part in parts.items() if name not in (LAYERS, MTP) or (name == MTP and segment.mtp)}
    return _together(shared, stacks, segment.items)


def add(total: nnx.State, grads: nnx.State, segment: Segment, chunk: Array) -> nnx.State:
    """`total`, laid out like a stage's parameters, with the gradients of a result of `take` added in place."""
    parts, (shared, stacks) = plain(total), _apart(grads, segment.items)
    if VOCABULARY in parts:
        (embedding, head), shared = _vocabulary_matrices(shared)
        grads_nd = [] if embedding is None else [embedding[...]]
        grads_nd += [] if head is None else [head[...].T]
        if grads_nd:  # at most one of the two, since they are on different stages
            parts[VOCABULARY] = parts[VOCABULARY].replace(parts[VOCABULARY][...] + grads_nd[0][None])
    layers = dict(parts.get(LAYERS, {}))
    for letter, tree in joined(stacks).items():
        layers[letter] = jax.tree.map(lambda a, b: add_rows(a, b, chunk), layers[letter], _marked(tree, staged=True))
    plus = lambda part, more: part if more is None else jax.tree.map(jnp.add, part, more)  # noqa: E731
    kept = {name: plus(part, shared.get(name)) for name, part in parts.items() if name != LAYERS}
    return nnx.State({**kept, **({LAYERS: layers} if layers else {})})


def _apart(state: Any, items: tuple[Items, Items]) -> tuple[dict[str, Any], list[ByLetter]]:
    """The parts of the state that are not layers, and the rows of the backbone's stack and of the MTP block's."""
    state = plain(state)
    shared = {name: part for name, part in state.items() if name != BACKBONE}
    stacks = [by_letter(state.get(BACKBONE, {}), items[0]), {}]
    if MTP in shared:
        stacks[1] = by_letter(shared[MTP].get(LAYERS, {}), items[1])
        shared[MTP] = {name: part for name, part in shared[MTP].items() if name != LAYERS}
    return {name: part for name, part in shared.items() if part}, stacks


def _together(shared: Mapping[str, Any], stacks: Sequence[ByLetter], items: tuple[Items, Items]) -> nnx.State:
    """The inverse of `_apart`."""
    whole = dict(shared)
    main, deeper = [state_of(stacked(stack, part)) for stack, part in zip(stacks, items, strict=True)]
    if main:
        whole[BACKBONE] = main
    if deeper:
        whole[MTP] = {**whole.get(MTP, {}), LAYERS: deeper}
    return nnx.State(whole)


def _paired(shared: Mapping[str, Any], stages: int) -> dict[str, Any]:
    """`shared` with embedding (n, d) and head (d, n) as one array (p, n, d): the first stage's and the last one's."""
    (embedding, head), others = _vocabulary_matrices(shared)
    lay = lambda e_nd, h_dn: jnp.stack([e_nd, *[jnp.zeros_like(e_nd)] * (stages - 2), h_dn.T])  # noqa: E731
    value = jax.tree.map(lay, embedding.get_value(), head.get_value())  # an optimizer's state may have no arrays here
    return {**others, VOCABULARY: _marked(embedding.from_metadata(value, embedding.get_metadata()), staged=True)}


def _unpaired(state: Mapping[str, Any], last: int) -> Mapping[str, Any]:
    """The inverse of `_paired`: the embedding from row 0, the head from the row `last`. Within one stage both are its
    only row, and the stage uses just one of the results."""
    if VOCABULARY not in state:
        return state
    others = {name: part for name, part in state.items() if name != VOCABULARY}
    both = _marked(state[VOCABULARY], staged=False)
    metadata = both.get_metadata()
    embedding = both.from_metadata(jax.tree.map(lambda both_pnd: both_pnd[0], both.get_value()), metadata)
    head = both.from_metadata(
        jax.tree.map(lambda both_pnd: both_pnd[last].T, both.get_value()), metadata | {"axes": metadata["axes"][::-1]}
    )
    return {**others, EMBEDDING: {**others.get(EMBEDDING, {}), WEIGHT: embedding}, HEAD: {WEIGHT: head}}


def _vocabulary_matrices(shared: Mapping[str, Any]) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """The matrices of embedding and head, None where there is none, and `shared` without them."""
    parts = {name: dict(shared.get(name, {})) for name in (EMBEDDING, HEAD)}
    matrices = parts[EMBEDDING].pop(WEIGHT, None), parts[HEAD].pop(WEIGHT, None)
    return matrices, {name: part for name, part in {**shared, **parts}.items() if part}


def _lay_out(index_pvr: np.ndarray, lead: int, *arrays: Array) -> Array:
    """(p, v, r, …): the rows of all arrays, along axis `lead`, at these indices; zeros past the end."""
    every = concatenated(0, *(jnp.moveaxis(a, lead, 0) for a in arrays))
    return jnp.take(every, index_pvr, axis=0, mode="fill", fill_value=0)


def _pick(row_n: np.ndarray, lead: int, array: Array) -> Array:
    """The rows `row_n` of an array (p, v, r, …), flattened over these axes, along axis `lead`."""
    return jnp.moveaxis(array.reshape(-1, *array.shape[3:])[row_n], 0, lead)


def _marked(tree: Any, *, staged: bool) -> Any:
    """`tree` with its variables marked as split over stages by the plan, or not."""

    def mark(variable: nnx.Variable) -> nnx.Variable:
        metadata = {name: value for name, value in variable.get_metadata().items() if name != "staged"}
        return variable.from_metadata(variable.get_value(), metadata | ({"staged": True} if staged else {}))

    return jax.tree.map(mark, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
