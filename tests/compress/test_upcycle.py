"""Upcycled models: what they compute at the start, and how their experts are cut. Shapes differ in every dimension."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.convert.synthetic import shapes, write
from tests.helpers import bound

from orogen.checkpoint import checksums
from orogen.checkpoint.folders import HuggingFaceFolder
from orogen.checkpoint.leaves import dotted, leaves_of
from orogen.checkpoint.open import open_model
from orogen.checkpoint.transfer import from_hf
from orogen.cli import main
from orogen.compress.upcycle import upcycled_config
from orogen.config.checks import ConfigError
from orogen.config.load import load, load_part
from orogen.config.model import ModelConfig
from orogen.config.text import model_text
from orogen.config.upcycle import UpcycleConfig
from orogen.infer.score import score
from orogen.model.lm import build

# Layers 1, 3 and 5 are dense; they are repeated, so that each is a part of a stacked array.
DENSE = ModelConfig(
    pattern="*-*-*-", vocab_size=23, hidden_size=10, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    intermediate_size=12,
)  # fmt: skip
TOKENS_BT = np.random.default_rng(1).integers(0, 23, (2, 17))


def save(folder, config, dtype=np.float32):
    """An Orogen checkpoint folder with random weights, large enough that every layer matters."""
    random = np.random.default_rng(0)
    built = build(config)
    shapes = {dotted(p): leaf.get_value().shape for p, leaf in leaves_of(built.params, built.buffers).items()}
    folder.mkdir()
    save_file({n: random.normal(0, 0.5, s).astype(dtype) for n, s in shapes.items()}, folder / "model.safetensors")
    (folder / "config.gin").write_text(model_text(config))
    return folder


def upcycle(source, target, *bindings):
    (source.parent / "upcycle.gin").write_text("UpcycleConfig.expansion = 3\n")
    file = str(source.parent / "upcycle.gin")
    return main(["upcycle", "--checkpoint", str(source), "--gin_file", file, "--out", str(target), *bound(*bindings)])


def logits(folder):
    return score(open_model(folder), TOKENS_BT)["logits"]


@pytest.mark.parametrize(
    ("model", "bindings"),
    [
        # The weights of the chosen experts add up to one, so the output is exact whatever the router says.
        ({}, ["UpcycleConfig.router_score = 'softmax_topk'"]),
        ({}, ["UpcycleConfig.norm_topk_prob = True", "UpcycleConfig.shared = 4"]),
        ({}, ["UpcycleConfig.norm_topk_prob = True", "UpcycleConfig.router_score = 'sigmoid'",
              "UpcycleConfig.router_correction_bias = True", "UpcycleConfig.layers = (3,)"]),
        ({"mlp_gated": True, "mlp_hidden_act": "silu"}, ["UpcycleConfig.router_score = 'softmax_topk'"]),
        ({"mlp_gated": True, "mlp_hidden_act": "silu"}, ["UpcycleConfig.norm_topk_prob = True",
                                                         "UpcycleConfig.shared = 2"]),
        ({"mlp_hidden_act": "relu"}, ["UpcycleConfig.norm_topk_prob = True"]),
        ({"mlp_hidden_act": "gelu"}, ["UpcycleConfig.norm_topk_prob = True", "UpcycleConfig.scale = 'output'"]),
    ],
)  # fmt: skip
def test_a_granular_mixture_begins_as_the_dense_model(tmp_path, model, bindings):
    dense = save(tmp_path / "dense", dataclasses.replace(DENSE, **model))
    granular = ["UpcycleConfig.granularity = 2", "UpcycleConfig.top_k = 4"]
    assert upcycle(dense, tmp_path / "sparse", *granular, *bindings) == 0
    before, after = logits(dense), logits(tmp_path / "sparse")
    np.testing.assert_allclose(after, before, atol=2e-5 * np.ptp(before))
    assert np.ptp(before) > 1


def test_softmax_before_the_choice_is_exact_for_a_router_without_preference(tmp_path):
    dense = save(tmp_path / "dense", DENSE)
    assert upcycle(dense, tmp_path / "sparse", "UpcycleConfig.granularity = 2", "UpcycleConfig.top_k = 2") == 0
    file = tmp_path / "sparse" / "model.safetensors"
    tensors = load_file(file)
    (tmp_path / "sparse" / checksums.NAME).unlink()
    save_file({n: np.zeros_like(x) if n.endswith("router.gate") else x for n, x in tensors.items()}, file)
    before, after = logits(dense), logits(tmp_path / "sparse")
    np.testing.assert_allclose(after, before, atol=2e-5 * np.ptp(before))


def test_without_virtual_groups_shards_of_different_copies_mix(tmp_path):
    dense = save(tmp_path / "dense", DENSE)
    bindings = ["UpcycleConfig.granularity = 2", "UpcycleConfig.top_k = 2", "UpcycleConfig.norm_topk_prob = True"]
    assert upcycle(dense, tmp_path / "sparse", *bindings, "UpcycleConfig.virtual_groups = False") == 0
    before, after = logits(dense), logits(tmp_path / "sparse")
    assert np.abs(after - before).max() > 0.05 * np.ptp(before)


def test_experts_are_shards_in_the_order_of_copies(tmp_path):
    dense = save(tmp_path / "dense", DENSE)
    assert upcycle(dense, tmp_path / "sparse", "UpcycleConfig.granularity = 2", "UpcycleConfig.top_k = 2") == 0
    old, new = load_file(dense / "model.safetensors"), load_file(tmp_path / "sparse" / "model.safetensors")
    prefix = "backbone.children.0.children.1.mixer"
    # three copies of two shards; E · G² / T = 3 · 4 / 2 = 6, whose cube root squared ReLU needs on both matrices
    for expert, columns in enumerate([slice(0, 6), slice(6, 12)] * 3):
        np.testing.assert_allclose(
            new[f"{prefix}.experts.up"][:, expert], old[f"{prefix}.up"][..., columns] * 6 ** (1 / 3), rtol=1e-6
        )
        np.testing.assert_allclose(
            new[f"{prefix}.experts.down"][:, expert], old[f"{prefix}.down"][:, columns] * 6 ** (1 / 3), rtol=1e-6
        )
    gate = new[f"{prefix}.router.gate"]  # three layers
    np.testing.assert_array_equal(gate[..., 0::2], gate[..., 1::2])
    assert len(np.unique(gate)) == 3 * 10 * 3 and abs(gate.std() / 10**-0.5 - 1) < 0.3  # width 10
    for name in old.keys() & new.keys():
        np.testing.assert_array_equal(old[name], new[name])


@pytest.mark.parametrize(
    ("expansion", "granularity", "top_k", "scale"),
    [(8, 8, 8, 4.0), (8, 1, 1, 2.0), (8, 1, 2, 1.587), (8, 8, 16, 3.175), (2, 2, 2, 1.587)],
)
def test_the_scales_are_those_of_the_paper(expansion, granularity, top_k, scale):
    from orogen.compress.upcycle import _factors

    config = UpcycleConfig(expansion=expansion, granularity=granularity, top_k=top_k)
    assert _factors(DENSE, config)[:2] == pytest.approx((scale, scale), abs=5e-4)


def test_the_published_model_comes_out():
    before = load(["gin_configs/models/nemotron4_15b.gin"])[0].model
    after = load(["gin_configs/models/nemotron4_15b_e8t2.gin"])[0].model
    assert upcycled_config(before, load_part(UpcycleConfig, ["gin_configs/upcycle/e8g1t2.gin"])) == after


def test_a_model_in_bfloat16_stays_so_with_its_router_in_float32(tmp_path):
    import ml_dtypes

    dense = save(tmp_path / "dense", DENSE, ml_dtypes.bfloat16)
    assert upcycle(dense, tmp_path / "sparse", "UpcycleConfig.top_k = 2") == 0
    kinds = {name: x.dtype.name for name, x in load_file(tmp_path / "sparse" / "model.safetensors").items()}
    assert {kind for name, kind in kinds.items() if "router" not in name} == {"bfloat16"}
    assert {kind for name, kind in kinds.items() if "router" in name} == {"float32"}


GELU, BIASED = {"mlp_hidden_act": "gelu"}, {"mlp_bias": True}


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({}, {"granularity": 5, "top_k": 5}, "expected a divisor of ModelConfig.intermediate_size = 12"),
        ({}, {"top_k": 4}, "UpcycleConfig.top_k is 4; expected at most expansion x granularity = 3"),
        ({}, {"granularity": 2, "top_k": 3}, "UpcycleConfig.top_k is 3; expected a multiple"),
        ({}, {"layers": (0, 1)}, "expected numbers of dense MLPs, which in '*-*-*-' are [1, 3, 5]"),
        ({}, {"router_score": "sigmoid"}, "UpcycleConfig.norm_topk_prob is False; expected True"),
        (GELU, {}, "expected 'output' or 'none': the MLP is not homogeneous"),
        (BIASED, {}, "ModelConfig.mlp_bias is True; expected False"),
    ],
)
def test_what_cannot_be_upcycled_is_refused_in_one_line(tmp_path, capsys, model, changes, message):
    dense = save(tmp_path / "dense", dataclasses.replace(DENSE, **model))
    bindings = [f"UpcycleConfig.{field} = {value!r}" for field, value in {"top_k": 1, **changes}.items()]
    assert upcycle(dense, tmp_path / "sparse", *bindings) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "sparse").exists()


def test_a_mixture_is_not_upcycled_again(tmp_path, capsys):
    dense = save(tmp_path / "dense", DENSE)
    assert upcycle(dense, tmp_path / "sparse", "UpcycleConfig.top_k = 1", "UpcycleConfig.layers = (1,)") == 0
    assert upcycle(tmp_path / "sparse", tmp_path / "again", "UpcycleConfig.top_k = 1") == 2
    assert "expected a model without experts" in capsys.readouterr().err


def test_a_config_is_refused_by_its_own_checks():
    with pytest.raises(ConfigError, match="UpcycleConfig.shared is 1; expected a multiple of granularity = 2"):
        UpcycleConfig(expansion=2, granularity=2, top_k=2, shared=1)


def test_a_hugging_face_folder_is_read_as_its_conversion_is(tmp_path):
    config, tensors = shapes("nemotron")
    unbiased = {name: shape for name, shape in tensors.items() if not (".mlp." in name and name.endswith("bias"))}
    write(tmp_path / "hf", config | {"mlp_bias": False}, unbiased, "float32")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    for source in ("hf", "ours"):
        assert upcycle(tmp_path / source, tmp_path / f"{source} upcycled", "UpcycleConfig.top_k = 2") == 0
    found, expected = (load_file(tmp_path / f"{name} upcycled" / "model.safetensors") for name in ("hf", "ours"))
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_each_piece_of_a_hugging_face_folder_is_that_of_the_whole(tmp_path):
    write(tmp_path / "hf", *shapes("nemotron_h"), "float32")
    with HuggingFaceFolder(tmp_path / "hf") as folder:
        for path, spec in folder.parameters().items():
            whole = folder.parameter(path, spec)
            for depth in range(min(3, len(spec.shape))):
                index = (0,) * depth
                np.testing.assert_array_equal(folder.piece(path, index), whole[index])


def test_a_folder_that_lacks_a_parameter_is_refused_in_one_line(tmp_path, capsys):
    dense = save(tmp_path / "dense", DENSE)
    tensors = load_file(dense / "model.safetensors")
    del tensors["head.weight"]
    save_file(tensors, dense / "model.safetensors")
    assert upcycle(dense, tmp_path / "sparse", "UpcycleConfig.top_k = 1") == 2
    assert "head.weight is missing" in capsys.readouterr().err and not (tmp_path / "sparse").exists()
