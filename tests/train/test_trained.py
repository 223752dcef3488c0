"""What a run does not train keeps its bits, has no moments, and adds nothing to the gradient's norm."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from tests.helpers import hybrid, run_config, several_devices

from orogen.config.checks import ConfigError
from orogen.cost.assemble import assemble
from orogen.model.lm import build
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.sides import packed_batch
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices, make_step
from orogen.train.trained import optimizer_of, part_of, trained_mask

MODEL = hybrid(
    pattern="x-|*-", mtp_depths=0, num_attention_heads=4, image_feature_size=5, image_features=3, resampler_latents=2,
    resampler_layers=1,
)  # fmt: skip


PARTS = ("x", "-", "*", "mtp", "norm", "resampler")


def config_of(names, frozen=(), model=MODEL, name="adamw", **plan):
    config = run_config(model, plan=plan, batch_size=4, sequence_length=16)
    optimizer = dataclasses.replace(config.optimizer, trained=names, frozen=frozen, name=name)
    return dataclasses.replace(config, optimizer=optimizer)


def leaves(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.array(leaf) for path, leaf in found}


@several_devices
def test_only_chosen_parts_move():
    config = config_of(("*", "resampler", "norm"), stage=2, microbatches=2, data=2)
    layout, built = assemble(MODEL, config.plan, length=16)
    optimizer = optimizer_of(config, built)
    state = create_state(MODEL, built, optimizer, layout, 0)
    before = leaves(jax.device_get(state.params))
    step = make_step(built, NEXT_TOKENS, config, layout, optimizer)
    state, metrics = step(state, batch_to_devices(packed_batch(config, config.train), layout))
    after = leaves(jax.device_get(state.params))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    # A closed gate lets nothing through to the resampler, but its weights decay.
    mask = leaves(trained_mask(built, config.optimizer))
    vectors = {name for name in mask if mask[name] and "resampler" in name and before[name].ndim == 1}
    assert moved == {name for name in mask if mask[name]} - vectors
    assert float(metrics.grad_norm) > 0
    moments = sum(leaf.size for name, leaf in leaves(state.optimizer).items() if ".mu." in f".{name}.")
    assert moments == sum(before[name].size for name in mask if mask[name])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_routers_keep_their_bits_and_their_biases_move(name):
    config = config_of((), ("router",), hybrid(pattern="*E", mtp_depths=0), name)
    plan, built = assemble(config.model, config.plan, length=16)
    optimizer = optimizer_of(config, built)
    state = create_state(config.model, built, optimizer, plan, 0)
    before, biases = (leaves(jax.device_get(tree)) for tree in (state.params, state.buffers))
    step = make_step(built, NEXT_TOKENS, config, plan, optimizer)
    state, _ = step(state, batch_to_devices(packed_batch(config, config.train), plan))
    after, moved = leaves(jax.device_get(state.params)), leaves(jax.device_get(state.buffers))
    frozen = {name for name in before if ".router." in name}
    assert frozen and all(np.array_equal(before[name], after[name]) for name in frozen)
    assert not any(np.array_equal(before[name], after[name]) for name in before.keys() - frozen)
    assert not any(np.array_equal(biases[name], moved[name]) for name in biases)


def test_biases_of_routers_in_layers_that_are_not_trained_stay():
    config = config_of(("*",), model=hybrid(pattern="*E", mtp_depths=0))
    plan, built = assemble(config.model, config.plan, length=16)
    optimizer = optimizer_of(config, built)
    state = create_state(config.model, built, optimizer, plan, 0)
    biases = leaves(jax.device_get(state.buffers))
    step = make_step(built, NEXT_TOKENS, config, plan, optimizer)
    state, _ = step(state, batch_to_devices(packed_batch(config, config.train), plan))
    kept = leaves(jax.device_get(state.buffers))
    assert kept and all(np.array_equal(biases[name], kept[name]) for name in biases)


@several_devices
def test_frozen_names_mean_the_same_with_and_without_stages():
    """A letter's are all layers of the letter, also the MTP block's; those of `layers` are all, and the resampler's."""
    model = hybrid(
        pattern="x-|*-/*", mtp_depths=1, num_attention_heads=4, image_feature_size=5, image_features=3,
        resampler_latents=2, resampler_layers=1,
    )  # fmt: skip

    def frozen(names, plan):
        """Of each part, whether all of it is frozen (True), some (None) or nothing (False)."""
        config = config_of((), names, model, **plan)
        _, built = assemble(model, config.plan, length=16)
        is_leaf, kept = lambda x: isinstance(x, nnx.Variable), {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(trained_mask(built, config.optimizer), is_leaf=is_leaf):
            keys = tuple(key.key for key in path)
            part = "*" if keys[:2] == ("mtp", "layers") else part_of(keys, "x-*-")
            kept.setdefault(part, set()).add(not leaf.get_value())
        return {part: flags.pop() if len(flags) == 1 else None for part, flags in kept.items() if part in PARTS}

    for plan in ({}, {"stage": 2, "microbatches": 2}):
        none = dict.fromkeys(PARTS, False)
        assert frozen(("x",), plan) == none | {"x": True}
        assert frozen(("*", "resampler"), plan) == none | {"*": True, "resampler": True}
        assert frozen(("layers",), plan) == none | {"x": True, "-": True, "*": True, "resampler": None}
        assert frozen(("mixer",), plan) == none | {"x": None, "-": None, "*": None}
        assert frozen(("mtp", "*"), plan) == none | {"mtp": True, "*": True}
        with pytest.raises(ConfigError, match="frozen has 'children'; expected the model's modules"):
            frozen(("children",), plan)
    with pytest.raises(ConfigError, match="expected . beside mtp: stages keep the MTP block's layers and the backbone"):
        frozen(("mtp",), plan)
    config = config_of(("mtp", "x"), (), model, **plan)
    with pytest.raises(ConfigError, match="expected both . and mtp, or neither: stages keep the MTP block's layers"):
        trained_mask(assemble(model, config.plan, length=16)[1], config.optimizer)


def test_a_parameter_belongs_to_its_letter_wherever_it_is():
    assert part_of(("backbone", "children", 1, "children", 0, "mixer", "up"), "M-*-*") == "-"
    assert part_of(("backbone", "children", 1, "children", 1, "norm", "weight"), "M-*-*") == "*"
    assert part_of(("backbone", "children", 0, "mixer", "layers", 3, "w"), "M-*-*") == "M"
    assert part_of(("layers", "x", "mixer", "query"), "M-*-*") == "x"
    assert part_of(("head", "weight"), "M") == "head"


def test_names_that_nothing_has_are_refused():
    with pytest.raises(ConfigError, match="has 'M'; expected letters of the pattern or parts of the model"):
        trained_mask(build(MODEL), config_of(("x", "M")).optimizer)
    with pytest.raises(ConfigError, match="frozen has 'gate'; expected the model's modules and parameters: .*mixer"):
        trained_mask(build(MODEL), config_of((), ("gate",)).optimizer)
    with pytest.raises(ConfigError, match="expected letters of"):
        config_of(("Q",))
    _, built = assemble(MODEL, config_of((), stage=2).plan, length=16)
    with pytest.raises(ConfigError, match="both embedding and head or neither"):
        trained_mask(built, config_of(("head",)).optimizer)
    assert trained_mask(built, config_of(()).optimizer) is None
