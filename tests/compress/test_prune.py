"""Pruned models: planted units that do nothing go without a trace, sizes are exact, and bad sizes are refused.

Shapes differ in every dimension.
"""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.compress.pruned import DEPTH, MODEL, OTHER, logits, of, prune, save

from orogen.checkpoint.leaves import leaves_of
from orogen.checkpoint.open import open_folder
from orogen.compress.choose import best, pruned_config
from orogen.compress.prune import check_target, decide, random_found
from orogen.compress.rewrite import Source, rewrite
from orogen.compress.slices import REST, Pruned, units_of
from orogen.config.checks import ConfigError
from orogen.config.kinds import LAYERS
from orogen.config.load import load
from orogen.config.plan import PlanConfig
from orogen.config.prune import PruneConfig
from orogen.config.search import SearchConfig
from orogen.model.count import count
from orogen.model.lm import build


def at(axis, units, value=0.0):
    """A change of the units along an axis, counted from the end."""

    def change(array):
        index: list = [slice(None)] * array.ndim
        index[axis] = list(units)
        array[tuple(index)] = value
        return array

    return change


# Units of the old model that do nothing, by the size that leaves them out: changes of parameters by the suffixes of
# their names. Query heads 0, 3, 5, 6, 8 and 11 are two of each key head's four: their sinks take all attention. Two
# heads of each of Mamba's six runs of three, which share both B and C and a group of the norm, read nothing.
CHANNELS = [0, 4, 7, 13, 20, 21]
MAMBA_HEADS = [0, 5, 8, 10, 12, 15]
inner = lambda units: [at(-1, units), ("x", "x_bias", "conv_x.bias")]  # noqa: E731
PLANTED = {
    "hidden_size": ("*-", [at(-1, CHANNELS), (
        "embedding.weight", "mixer.out", "mixer.down", "latent_up", "shared.down", "out_bias", "mixer.down_bias",
        "latent_up_bias", "shared.down_bias", "mtp.project")]),
    "intermediate_size": ("-", [at(-1, range(7)), ("mixer.up", "mixer.up_bias")]),
    "num_attention_heads": ("*", [at(-1, [0, 3, 5, 6, 8, 11], 90.0), ("sinks",)]),
    "num_key_value_heads": ("*", [at(-1, range(4, 8)), ("value", "value_bias")]),
    "mamba_num_heads": ("M", inner([h * 5 + p for h in MAMBA_HEADS for p in range(5)])),
    "mamba_head_dim": ("M", inner([h * 5 + p for h in range(18) for p in (0, 3)])),
    "n_routed_experts": ("E", [at(-1, [1, 6], -90.0), ("router.bias",)]),
    "moe_intermediate_size": ("E", [at(-1, [2, 3, 5, 8, 13]), ("experts.up",)]),
    "moe_shared_expert_intermediate_size": ("E", [at(-1, [0, 4, 9]), ("shared.up", "shared.up_bias")]),
    "moe_latent_size": ("E", [at(-1, range(3, 8)), ("latent_down", "latent_down_bias", "experts.down")]),
}  # fmt: skip
SIZES = {
    "hidden_size": 16, "intermediate_size": 19, "num_attention_heads": 6, "num_key_value_heads": 2,
    "mamba_num_heads": 12, "mamba_head_dim": 3, "n_routed_experts": 6, "moe_intermediate_size": 9,
    "moe_shared_expert_intermediate_size": 7, "moe_latent_size": 11,
}  # fmt: skip


def planted(*fields):
    def change(name, array):
        for field in fields:
            _, (zero, suffixes) = PLANTED[field]
            if any(f".{name}".endswith(f".{end}") for end in suffixes):
                array = zero(array)
        return array

    return change


@pytest.mark.parametrize("field", ["hidden_size", "num_key_value_heads"])
def test_units_that_do_nothing_leave_no_trace(tmp_path, field):
    pattern = PLANTED[field][0]
    before = save(tmp_path / "before", of(pattern), planted(field))
    assert prune(before, tmp_path / "after", f"{field} = {SIZES[field]}") == 0
    old, new = logits(before), logits(tmp_path / "after")
    assert np.ptp(old) > 1 and getattr(load([tmp_path / "after" / "config.gin"])[0].model, field) == SIZES[field]
    np.testing.assert_allclose(new, old, atol=1e-4 * np.ptp(old))


def test_all_sizes_at_once(tmp_path, capsys):
    fields = [field for field in PLANTED if field != "num_key_value_heads"]
    before = save(tmp_path / "before", MODEL, planted(*fields))
    sizes = [f"{field} = {SIZES[field]}" for field in fields]
    assert prune(before, tmp_path / "after", *sizes, more=["--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    old, new = logits(before), logits(tmp_path / "after")
    np.testing.assert_allclose(new, old, atol=1e-4 * np.ptp(old))
    config = load([tmp_path / "after" / "config.gin"])[0].model
    assert config == dataclasses.replace(MODEL, **{field: SIZES[field] for field in fields})
    arrays = load_file(tmp_path / "after" / "model.safetensors")
    assert sum(array.size for array in arrays.values()) == told["parameters"][1] == count(config)["total"]
    facts = json.loads((tmp_path / "after" / "pruning.json").read_text())
    assert sorted(facts["kept"]["hidden"]) == sorted(set(range(22)) - set(CHANNELS))
    assert facts["rows"] == 12 and facts["prune"]["hidden_size"] == 16 and told["sizes"]["hidden_size"][:2] == [22, 16]
    assert (tmp_path / "after" / "pruning.png").read_bytes()[:4] == b"\x89PNG"
    # The scores are enough to prune the same model again, without text.
    again = ["--scores", str(tmp_path / "after")]
    assert prune(before, tmp_path / "again", *sizes, more=again) == 0
    for name, array in load_file(tmp_path / "again" / "model.safetensors").items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


@pytest.mark.parametrize("field", PLANTED)
def test_each_size_alone_leaves_the_others(tmp_path, field):
    before, settings = save(tmp_path / "before", MODEL), PruneConfig(**{field: SIZES[field]}, width_scores="random")
    choice = decide(MODEL, settings, random_found(MODEL, settings), PlanConfig())
    with open_folder(before) as folder:
        source, parameters = Source(folder), count(choice.config)["total"]
        maker = Pruned(source, choice.kept)
        rewrite(source, maker, choice.config, before, tmp_path / "after", parameters=parameters)
    config = load([tmp_path / "after" / "config.gin"])[0].model
    more = {"num_attention_heads": 8} if field == "num_key_value_heads" else {}
    assert config == dataclasses.replace(MODEL, **{field: SIZES[field]}, **more)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    changed = [name for name in old if old[name].shape != new[name].shape]
    _, (_, suffixes) = PLANTED[field]
    assert changed and all(np.array_equal(old[name], new[name]) for name in old if name not in changed)
    assert all(any(f".{name}".endswith(f".{end}") for name in changed) for end in suffixes)


def test_mamba_heads_are_really_pruned(tmp_path):
    """By hand: 12 of 18 heads of 5 channels are 60 of 90 columns."""
    before = save(tmp_path / "before", of("M"))
    assert prune(before, tmp_path / "after", "mamba_num_heads = 12", "width_scores = 'random'") == 0
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    prefix = "backbone.children.0.mixer."
    shapes = {name.removeprefix(prefix): array.shape for name, array in new.items() if name.startswith(prefix)}
    assert shapes["x"] == shapes["z"] == (22, 60) and shapes["out"] == (60, 22) and shapes["dt"] == (22, 12)
    assert shapes["A_log"] == shapes["D"] == shapes["dt_bias"] == (12,) and shapes["conv_x.weight"] == (60, 4)
    assert shapes["B"] == (22, 14) and shapes["norm.weight"] == (60,)
    kept = json.loads((tmp_path / "after" / "pruning.json").read_text())["kept"]["units"][0]["mamba_heads"]
    assert sorted(head // 3 for head in kept) == [group for group in range(6) for _ in range(2)]
    np.testing.assert_array_equal(new[prefix + "D"], old[prefix + "D"][kept])
    columns = [head * 5 + p for head in kept for p in range(5)]
    np.testing.assert_array_equal(new[prefix + "x"], old[prefix + "x"][:, columns])
    np.testing.assert_allclose(new[prefix + "norm.weight"], old[prefix + "norm.weight"][columns] * 1.5**0.5, rtol=1e-6)


def test_the_best_of_each_group_stay_in_the_order_of_their_scores():
    score_n = np.array([1.0, 4.0, 2.0, 3.0, 9.0, 9.0])
    assert best(score_n, 4).tolist() == [4, 5, 1, 3]
    assert best(score_n, 4, groups=2).tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize("model", [MODEL, OTHER], ids=["MODEL", "OTHER"])
def test_every_parameter_has_a_rule(model):
    built = build(model)
    for path, leaf in leaves_of(built.params, built.buffers).items():
        name = ".".join(part for part in path if isinstance(part, str))
        if "children" not in path:
            assert len(REST[name]) == len(leaf.get_metadata()["axes"])
        elif "mixer" in path:
            inside = name.rpartition("mixer.")[2]
            assert any(inside in units_of(letter) for letter, kind in LAYERS.items() if kind.units), name


def test_a_model_of_other_layers_is_pruned(tmp_path):
    """MLA, Mamba-1, experts without a latent, tied embeddings, learned positions, layer norms."""
    before = save(tmp_path / "before", OTHER)
    sizes = ["hidden_size = 16", "num_attention_heads = 5", "n_routed_experts = 4", "moe_intermediate_size = 9"]
    assert prune(before, tmp_path / "after", *sizes) == 0
    arrays = load_file(tmp_path / "after" / "model.safetensors")
    assert (
        sum(array.size for array in arrays.values())
        == count(
            dataclasses.replace(
                OTHER, hidden_size=16, num_attention_heads=5, n_routed_experts=4, moe_intermediate_size=9
            )
        )["total"]
    )


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["mamba_num_heads = 13"], "PruneConfig.mamba_num_heads is 13; expected 12, the nearest that is at most 18"),
        (["num_attention_heads = 7"], "expected 6, the nearest that is at most 12, as ModelConfig.num_attention_heads"),
        (["num_key_value_heads = 2", "num_attention_heads = 10"], "expected 8, the nearest that is at most 8"),
        (["n_routed_experts = 3"], "expected 4, the nearest that is at most 8"),
        (["n_routed_experts = 2"], "at least 4 for num_experts_per_tok = 3 and a multiple of n_group = 2"),
        (["hidden_size = 23"], "PruneConfig.hidden_size is 23; expected 22, the nearest that is at most 22"),
        (["intermediate_size = 19", "PlanConfig.tensor = 2"], "is 19; expected 20, the nearest that is at most 26"),
        (
            ["hidden_size = 15", "PlanConfig.data = 2", "PlanConfig.fsdp = 'parameters'", "batch_size = 4"],
            "is 15; expected 16, the nearest that is at most 22, as ModelConfig.hidden_size is and a multiple of",
        ),
        (
            ["n_routed_experts = 6", "PlanConfig.data = 4", "PlanConfig.expert = 4", "hidden_size = 16"],
            "PruneConfig.n_routed_experts is 6; expected 8",
        ),
        (["num_layers = 10"], "PruneConfig.num_layers is 10; expected at most 5, the layers of the model"),
        (["layers = {'*': 3}"], "expected at most 1 of *"),
        (["pattern = 'M*-EM-'"], "expected layers of 'MM*E-' in their order; the nearest is 'M*E-'"),
        (["remove_layers = (9,)"], "PruneConfig.remove_layers is (9,); expected numbers below 5"),
        (["rows = 300", "hidden_size = 16"], "PruneConfig.rows is 300; expected at most"),
        (["sequence_length = 1000000", "hidden_size = 16"], "PruneConfig.sequence_length is 1000000; expected less: "),
        (["sequence_length = 25", "hidden_size = 16", "PlanConfig.context = 2"], "such as 24"),
        (["num_layers = 4", "pattern = 'M'"], "expected nothing beside PruneConfig.num_layers"),
        ([], "PruneConfig.hidden_size is None; expected a size here"),
        (["num_layers = 4", "iterative = True", "depth_scores = 'cosine'"], "PruneConfig.iterative is True"),
    ],
)
def test_what_cannot_be_pruned_is_refused_in_one_line(tmp_path, capsys, bindings, message):
    before = save(tmp_path / "before", MODEL)
    assert prune(before, tmp_path / "after", *bindings) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "after").exists()


def test_another_number_of_parameters_leaves_no_folder(tmp_path):
    before, settings = save(tmp_path / "before", DEPTH), PruneConfig(intermediate_size=8, width_scores="random")
    choice = decide(DEPTH, settings, random_found(DEPTH, settings), PlanConfig())
    with open_folder(before) as folder, pytest.raises(ConfigError, match="parameters were made; expected 7"):
        source = Source(folder)
        rewrite(source, Pruned(source, choice.kept), choice.config, before, tmp_path / "after", parameters=7)
    assert not (tmp_path / "after").exists()


def test_axes_that_the_model_lacks_are_refused():
    with pytest.raises(ConfigError, match="mamba_num_heads is 8; expected None: the model has no layers of Mamba-2"):
        pruned_config(DEPTH, PruneConfig(mamba_num_heads=8), tuple(range(6)), PlanConfig())
    with pytest.raises(ConfigError, match="expected None: ModelConfig.moe_latent_size is None"):
        pruned_config(OTHER, PruneConfig(moe_latent_size=8), tuple(range(4)), PlanConfig())


@pytest.mark.parametrize("letter", LAYERS)
def test_layers_are_pruned_or_refused(letter):
    """Every letter either has rules for all its parameters, or is refused by name."""
    sizes = {"sliding_window": 8, "image_feature_size": 6, "image_features": 5, "resampler_latents": 4,
             "resampler_layers": 1}  # fmt: skip
    source = OTHER if letter in "+m" else dataclasses.replace(MODEL, **sizes)
    model = dataclasses.replace(source, pattern=letter, mtp_depths=0)
    settings = PruneConfig(hidden_size=16)
    if not LAYERS[letter].units:
        with pytest.raises(ConfigError, match=f"ModelConfig.pattern has layers {letter}; expected only M "):
            check_target(model, settings, PlanConfig())
        with pytest.raises(ConfigError, match="expected none: such layers cannot be pruned"):
            SearchConfig().counts(model)
        return
    check_target(model, settings, PlanConfig())
    names = {".".join(part for part in path if isinstance(part, str)) for path in leaves_of(build(model).params)}
    inside = {name.rpartition("mixer.")[2] for name in names if "mixer." in name}
    assert inside and inside <= units_of(letter).keys()


def test_a_reward_model_is_refused():
    with pytest.raises(ConfigError, match="ModelConfig.score_head is True; expected False"):
        check_target(dataclasses.replace(DEPTH, score_head=True), PruneConfig(hidden_size=8), PlanConfig())


def test_an_existing_folder_is_left_alone(tmp_path, capsys):
    before = save(tmp_path / "before", DEPTH)
    (tmp_path / "after").mkdir()
    assert prune(before, tmp_path / "after", "intermediate_size = 8") == 2
    assert "exists; expected a new name" in capsys.readouterr().err
