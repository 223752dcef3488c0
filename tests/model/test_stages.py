"""A model split into stages holds every layer once, where its segment is, and is put together again to the bit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.helpers import hybrid
from tests.model.small import randomised

from orogen.model.block import repeats
from orogen.model.by_letter import by_letter, stacked
from orogen.model.layout import Whole
from orogen.model.lm import build, initial_state
from orogen.model.stages import Stages, add, take

STAGED = "layers", "vocabulary"
MODEL = hybrid(pattern="MEMEM*EE-M*-/*E", mtp_depths=2)
# Uneven, with empty segments, one segment of everything, and a repetition that a border goes through.
SEGMENTS = [("MEM", "EM*EE", "-M", "*-"), ("", "MEMEM*EE-M*-", "", ""), ("MEMEM*", "EE-M*-")]


@functools.cache
def whole() -> tuple[nnx.State, nnx.State]:
    """Parameters and buffers of MODEL, drawn by numpy: to compile their initialisation would take longer."""
    built, rng = build(MODEL), np.random.default_rng(0)
    return tuple(jax.tree.map(jnp.asarray, randomised(part, rng)) for part in (built.params, built.buffers))


@pytest.fixture
def state() -> tuple[nnx.State, nnx.State]:
    return whole()


@functools.cache
def laid_out(patterns: tuple[str, ...], stages: int) -> tuple[nnx.State, nnx.State]:
    """The same, split."""
    split = Stages(patterns, "*E", stages).split
    return jax.jit(lambda trees: tuple(split(tree) for tree in trees))(whole())


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("patterns", SEGMENTS, ids=str)
def test_what_is_split_joins_to_the_bit(state, patterns, stages):
    if len(patterns) % stages:
        stages = len(patterns)
    join = Stages(patterns, "*E", stages).join
    joined = jax.jit(lambda trees: tuple(join(tree) for tree in trees))(laid_out(patterns, stages))
    chex.assert_trees_all_equal(joined, state)


def test_a_layer_lies_where_its_segment_is(state):
    """Segment g is chunk g // p of stage g % p, the MTP block's layers after those of the last."""
    split, keys = laid_out(SEGMENTS[0], 2)[0], state[0]
    heads_pvrd = split["layers"]["*"]["mixer"]["query"][...]
    assert heads_pvrd.shape[:3] == (2, 2, 2)
    queries = _leaves(keys, "query")
    assert np.array_equal(heads_pvrd[1, 0, 0], queries[0]), "segment 1 has the first attention layer"
    assert np.array_equal(heads_pvrd[1, 1, 0], queries[1]), "segment 3, chunk 1 of stage 1, has the second"
    assert np.array_equal(heads_pvrd[1, 1, 1], keys["mtp"]["layers"]["children"][0]["mixer"]["query"][...])
    assert not np.any(heads_pvrd[0])
    assert split["layers"]["E"]["mixer"]["router"]["gate"].get_metadata()["staged"]


@pytest.mark.parametrize("patterns", SEGMENTS, ids=str)
def test_every_layer_has_an_address_under_every_layout(state, patterns):
    """Parameters and buffers of each, against the place that the fold of the pattern gives it."""
    whole, stages = Whole(MODEL.layers.main, MODEL.layers.mtp), Stages(patterns, "*E", len(patterns) // 2)
    numbers = dict.fromkeys("ME*-", 0)
    split = laid_out(patterns, len(patterns) // 2)
    stacks = [by_letter(state[0]["backbone"], repeats(MODEL.layers.main))]
    stacks.append(by_letter(state[0]["mtp"]["layers"], repeats(MODEL.layers.mtp)))
    for number, letter in enumerate(MODEL.layers.main + MODEL.layers.mtp):
        if number == len(MODEL.layers.main):
            numbers = dict.fromkeys(numbers, 0)
        rows, row = stacks[number >= len(MODEL.layers.main)][letter], numbers[letter]
        numbers[letter] += 1
        for tree, apart in zip(state, split, strict=True):
            found, other = whole.layer(tree, number), stages.layer(apart, number)
            assert jax.tree.structure(found) == jax.tree.structure(other)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True):
                np.testing.assert_array_equal(a, b)
        for a, b in zip(jax.tree.leaves(whole.layer(state[0], number)), jax.tree.leaves(rows), strict=True):
            np.testing.assert_array_equal(a, b[row])
        assert bool(jax.tree.leaves(whole.layer(state[1], number))) == (letter == "E")


def _leaves(params: nnx.State, name: str) -> list[np.ndarray]:
    """The attention layers' arrays of this name, in the order of the pattern."""
    stack = by_letter(params["backbone"], repeats(MODEL.layers.main))
    return list(stack["*"]["mixer"][name][...])


@pytest.mark.parametrize("patterns", SEGMENTS, ids=str)
def test_taking_every_segment_and_adding_it_up_gives_the_split_model(patterns):
    stages_of = Stages(patterns, "*E", len(patterns) // 2)
    split = laid_out(patterns, len(patterns) // 2)[0]
    total = jax.jit(lambda split: _added_up(stages_of, split)[0])(split)
    for name, part in split.items():
        # A deeper prediction embeds on the last stage what the first does for the next token.
        times = 2 if name == "embedding" else 1
        for a, b in zip(jax.tree.leaves(total[name]), jax.tree.leaves(part), strict=True):
            assert np.array_equal(a, times * b), name


def _added_up(stages_of: Stages, split: nnx.State) -> tuple[nnx.State, list[nnx.State]]:
    """The sum of every segment's parameters in the places that they were taken from, and what was taken of each."""
    total, found = jax.tree.map(jnp.zeros_like, split), []
    for number, segment in enumerate(stages_of.segments):
        chunk, stage = jnp.int32(number // stages_of.stages), number % stages_of.stages
        taken = take(_of_stage(split, stage), segment, chunk)
        used = nnx.State({n: p for n, p in taken.items() if segment.uses(n, tied=False)})
        total = _put_back(total, add(_of_stage(total, stage), used, segment, chunk), stage)
        found.append(taken)
    return total, found


def test_embedding_and_head_are_one_array_where_no_stage_needs_both():
    """Of three stages the first has the embedding, the last the head as rows, and the one between them nothing; what
    they add up from their own gradients joins to a whole model's."""
    model = hybrid(pattern="M*-", mtp_depths=0, learned_positions=7)
    stages_of, (params, _) = Stages(("M", "*", "-"), "", 3), jax.jit(lambda: initial_state(model, 0))()
    split = jax.jit(stages_of.split)(params)
    assert "head" not in split and set(split["embedding"]) == {"positions"}
    vocabulary = split["vocabulary"]
    assert vocabulary.get_metadata()["staged"] and vocabulary.get_metadata()["axes"] == ("vocab", "embed")
    assert np.array_equal(vocabulary[0], params["embedding"]["weight"][...])
    assert np.array_equal(vocabulary[2], params["head"]["weight"][...].T)
    assert not np.any(vocabulary[1])
    join = jax.jit(stages_of.join)
    chex.assert_trees_all_equal(join(split), params)
    total, taken = jax.jit(lambda split: _added_up(stages_of, split))(split)
    for part in taken:
        assert part["head"]["weight"].get_metadata()["axes"] == ("embed", "vocab")
    chex.assert_trees_all_equal(join(total), params)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"pattern": "M*/*", "mtp_depths": 1}], ids=str)
def test_an_embedding_that_the_last_stage_needs_too_is_on_every_stage(changes):
    model = hybrid(**{"pattern": "M*", "mtp_depths": 0, **changes})
    params = build(model, Stages(("M", "*"), model.layers.mtp, 2)).params
    assert "vocabulary" not in params
    assert not params["embedding"]["weight"].get_metadata().get("staged")


def _of_stage(tree: nnx.State, stage: int) -> nnx.State:
    own = lambda name, part: jax.tree.map(lambda a: a[stage : stage + 1], part) if name in STAGED else part  # noqa: E731
    return nnx.State({name: own(name, part) for name, part in tree.items()})


def _put_back(tree: nnx.State, part: nnx.State, stage: int) -> nnx.State:
    def put(name, old, new):
        return jax.tree.map(lambda a, b: a.at[stage].set(b[0]), old, new) if name in STAGED else new

    return nnx.State({name: put(name, tree[name], part[name]) for name in tree})


def test_a_taken_segment_is_a_model_of_its_layers():
    segment = Stages(SEGMENTS[0], "*E", 4).segments[1]
    taken = jax.jit(lambda split: take(_of_stage(split, 1), segment, jnp.int32(0)))(laid_out(SEGMENTS[0], 4)[0])
    expected = build(hybrid(pattern="EM*EE", mtp_depths=0)).params
    found = {name: jax.tree.map(jnp.shape, part) for name, part in taken.items()}
    assert jax.tree.leaves(found["backbone"]) == jax.tree.leaves(jax.tree.map(jnp.shape, expected["backbone"]))
    assert "mtp" not in taken
    assert not any(
        leaf.get_metadata().get("staged")
        for leaf in jax.tree.leaves(taken, is_leaf=lambda x: isinstance(x, nnx.Variable))
    )


def test_rows_of_nested_repetitions_are_in_the_order_of_the_pattern():
    pattern = "MEME*MEME*-"
    items = repeats(pattern)

    def labelled(items, lead):
        """A tree of arrays (lead…, 2) that say which layer of the pattern they are."""
        return tuple(labels(item, lead) for item in items)

    def labels(item, lead):
        if isinstance(item, str):
            return np.zeros((*lead, 2))
        return labelled(item.items, (*lead, item.count))

    tree = labelled(items, (3,))
    found = by_letter(tree, items, lead=1)
    assert {letter: array.shape for letter, array in found.items()} == {
        letter: (3, pattern.count(letter), 2) for letter in set(pattern)
    }
    numbered = {letter: jnp.arange(a.shape[1])[None, :, None] + jnp.zeros(a.shape) for letter, a in found.items()}
    again = by_letter(stacked(numbered, items, lead=1), items, lead=1)
    assert all(np.array_equal(again[letter], numbered[letter]) for letter in numbered)
