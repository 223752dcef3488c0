"""Any subset of axes: the parameters that the config counts, and no logit changed where planted units do nothing.

The logits are those of a forward pass in numpy (`plain.py`), of the multi-token-prediction depths too.
"""

import itertools
import json
import random

import numpy as np
import pytest
from tests.compress.plain import logits as plain_logits
from tests.compress.pruned import TOKENS_BT, logits, prune, save

from orogen.checkpoint.leaves import dotted
from orogen.checkpoint.open import open_folder
from orogen.compress.prune import decide
from orogen.compress.pruning import read_scores
from orogen.compress.rewrite import Source
from orogen.compress.slices import Pruned
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.prune import PruneConfig
from orogen.model.count import count
from orogen.model.homes import homes

MODEL = ModelConfig(
    pattern="M*E-M/*E", vocab_size=259, hidden_size=22, num_attention_heads=12, num_key_value_heads=3, head_dim=4,
    intermediate_size=26, mamba_num_heads=12, mamba_head_dim=5, n_groups=2, ssm_state_size=7, chunk_size=8,
    n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=14, moe_shared_expert_intermediate_size=10,
    moe_latent_size=16, routed_scaling_factor=2.5, mtp_depths=2, layer_norm_epsilon=1e-12,
)  # fmt: skip
SIZES = {
    "hidden_size": 16, "intermediate_size": 19, "num_attention_heads": 6, "num_key_value_heads": 2,
    "mamba_num_heads": 8, "mamba_head_dim": 3, "n_routed_experts": 6, "moe_intermediate_size": 9,
    "moe_shared_expert_intermediate_size": 7, "moe_latent_size": 11,
}  # fmt: skip
AXES, DRAWN = (*SIZES, "num_layers"), 24
# Units that do nothing: a key head and two of the query heads of each other one; two heads of each of Mamba's groups.
HEADS, KEY_HEAD, MAMBA_HEADS, MAMBA_DIMS, EXPERTS, IDLE = (
    [0, 2, 4, 5, 6, 7, 9, 11],
    1,
    [1, 4, 6, 9],
    [0, 3],
    [2, 5],
    (3, 4),
)
CHANNELS, HIDDEN, WIDTH, SHARED, LATENT = [0, 4, 7, 13, 20, 21], range(7), range(5, 10), [0, 4, 9], range(3, 8)
columns = lambda heads, size: [head * size + k for head in heads for k in range(size)]  # noqa: E731
INNER = sorted({*columns(MAMBA_HEADS, 5), *(h * 5 + p for h in range(12) for p in MAMBA_DIMS)})
WRITERS = "embedding.weight", "mixer.out", "mixer.down", "latent_up", "shared.down", "mtp.project"
# Ends of names, an axis with its size, units on it, and what they become. Nothing writes the channels and Mamba's
# units; no token chooses the experts; all else is not read.
PLANTED = [
    *((name, -1, 22, CHANNELS, 0) for name in WRITERS), ("children.3.mixer.down", -2, 26, range(26), 0),
    ("children.4.mixer.out", -2, 60, range(60), 0), ("mixer.x", -1, 60, INNER, 0), ("conv_x.bias", -1, 60, INNER, 0),
    ("mixer.out", -2, 48, columns(HEADS, 4), 0), ("mixer.down", -2, 26, HIDDEN, 0), ("experts.down", -2, 14, WIDTH, 0),
    ("shared.down", -2, 10, SHARED, 0), ("experts.up", -2, 16, LATENT, 0), ("latent_up", -2, 16, LATENT, 0),
    ("router.bias", -1, 8, EXPERTS, -90),
]  # fmt: skip


def plant(name, array):
    for end, axis, size, units, value in PLANTED:
        if f".{name}".endswith(f".{end}") and array.shape[axis] == size:
            np.moveaxis(array, axis, 0)[list(units)] = value
    return array


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The planted model, and one that was pruned along all axes but the layers, of which all have scores."""
    folder = tmp_path_factory.mktemp("planted")
    before = save(folder / "before", MODEL, plant)
    sizes = [f"{field} = {size}" for field, size in sizes_of(SIZES).items()]
    assert prune(before, folder / "after", *sizes, "num_layers = 3", "depth_scores = 'cosine'") == 0
    return before, folder / "after"


def sizes_of(axes):
    """Their sizes; 8 of the 12 query heads go with the key head and the idle ones of the others."""
    sizes = {axis: SIZES[axis] for axis in axes if axis in SIZES}
    return sizes | ({"num_attention_heads": 4} if {"num_attention_heads", "num_key_value_heads"} <= {*axes} else {})


def test_what_does_nothing_has_the_lowest_scores(folders):
    kept = json.loads((folders[1] / "pruning.json").read_text())["kept"]
    assert sorted(kept["removed"]) == list(IDLE)
    assert sorted(kept["hidden"]) == without(22, CHANNELS)
    expected = {
        "key_heads": without(3, [KEY_HEAD]), "query_heads": without(12, HEADS), "mlp": without(26, HIDDEN),
        "mamba_heads": without(12, MAMBA_HEADS), "mamba_dims": without(5, MAMBA_DIMS), "experts": without(8, EXPERTS),
        "shared": without(10, SHARED), "latent_in": without(16, LATENT), "latent_out": without(16, LATENT),
    }  # fmt: skip
    arrays = np.load(folders[1] / "pruning.npz")
    for number, (letter, units) in enumerate(zip("M*E-M*E", kept["units"], strict=True)):
        if number not in IDLE:  # of a layer that does nothing all units do nothing
            assert {name: sorted(index) for name, index in units.items()} == {name: expected[name] for name in units}
            assert bool(units) and (letter != "E" or len(units) == 4)
    for number in (2, 6):
        for expert in without(8, EXPERTS):
            assert sorted(arrays[f"kept.{number}.expert_width"][expert]) == without(14, WIDTH)


def without(size, units):
    return sorted({*range(size)} - {*units})


class Arrays:
    """The planted model's parameters, each read once, and what is made of them."""

    def __init__(self, folder):
        self.source = Source(folder)
        stems = [home.path for home in self.source.homes]
        self.rest = [path for path in self.source.specs if not any(path[: len(stem)] == stem for stem in stems)]

    def of(self, config, layer, rest):
        layers = [{dotted(name): array for name, array in layer(n).items()} for n in range(len(homes(config)))]
        return layers, {dotted(path): rest(path) for path in self.rest}

    def logits(self, config, layers, rest):
        double = lambda arrays: {name: array.astype(np.float64) for name, array in arrays.items()}  # noqa: E731
        return plain_logits(config, [*map(double, layers)], double(rest), TOKENS_BT[0])


def subsets():
    """Each axis alone, all but one, all, and others drawn at random."""
    every = [axes for size in range(1, len(AXES) + 1) for axes in itertools.combinations(AXES, size)]
    extreme = [axes for axes in every if len(axes) in (1, len(AXES) - 1, len(AXES))]
    return extreme + random.Random(0).sample([axes for axes in every if axes not in extreme], DRAWN)


def test_every_subset_leaves_no_trace(folders):
    """The number of parameters is that of the config."""
    before, after = folders
    with open_folder(before) as folder:
        arrays = Arrays(folder)
        old = arrays.logits(MODEL, *arrays.of(MODEL, lambda n: arrays.source.layer(n).arrays(), arrays.source.read))
        np.testing.assert_allclose(old[0], logits(before)[0], atol=1e-5 * np.ptp(old[0]))
        for axes in subsets():
            layers = {"num_layers": 3, "depth_scores": "cosine"} if "num_layers" in axes else {}
            settings = PruneConfig(**sizes_of(axes), **layers, rows=12, depth_rows=3)
            choice = decide(MODEL, settings, read_scores(after, MODEL, settings), PlanConfig())
            maker = Pruned(arrays.source, choice.kept)
            made = arrays.of(choice.config, maker.layer, maker.rest)
            size = sum(array.size for part in (*made[0], made[1]) for array in part.values())
            assert size == count(choice.config)["total"], axes
            for mine, whole in zip(arrays.logits(choice.config, *made), old, strict=True):
                np.testing.assert_allclose(mine, whole, atol=1e-6 * np.ptp(whole), err_msg=str(axes))


def test_the_model_itself_is_that_of_numpy_after_all_axes(folders):
    np.testing.assert_allclose(logits(folders[1]), logits(folders[0]), atol=1e-5 * np.ptp(logits(folders[0])))
