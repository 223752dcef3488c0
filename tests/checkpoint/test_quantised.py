"""Quantised Hugging Face folders open decoded, become Orogen folders and come back to the bit; others are refused."""

import json
import shutil

import numpy as np
import pytest
from tests.convert.quantised import BF16, CASES, E4M3, compressed, compressed_rows, nano, read, super_mixed
from tests.convert.synthetic import same

from orogen.checkpoint.open import open_folder, open_model
from orogen.checkpoint.transfer import export, from_hf
from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig
from orogen.convert.quantization import read_quantization


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Each case with its folder, and the Orogen folder made from that."""
    made = {}

    def find(name):
        if name not in made:
            root, case = tmp_path_factory.mktemp(name.replace(" ", "_")), CASES[name]()
            case.write(root / "hf", shards=2 if name == "super" else 1)
            from_hf(root / "hf", root / "ours")
            made[name] = root, case
        return made[name]

    return find


@pytest.mark.parametrize("name", CASES)
def test_layouts_come_back_to_the_bit(cases, name, tmp_path):
    root, case = cases(name)
    export(root / "ours", tmp_path / "back")
    assert same(read(tmp_path / "back"), case.tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == case.config
    there = tmp_path / "back" / "hf_quant_config.json"
    assert there.exists() == (case.other is not None)
    assert case.other is None or there.read_bytes() == (root / "hf" / there.name).read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_the_written_ones(cases, name, tmp_path):
    """With a dtype, an export decodes: every tensor, whatever its scales, in the plain layout."""
    root, case = cases(name)
    export(root / "ours", tmp_path / "plain", dtype="float32")
    found = read(tmp_path / "plain")
    assert found.keys() == case.decoded.keys()
    for tensor, numbers in case.decoded.items():
        np.testing.assert_array_equal(found[tensor], numbers, err_msg=tensor)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config and not (tmp_path / "plain" / "hf_quant_config.json").exists()


def test_the_model_opens_on_any_plan_and_in_any_dtype(cases):
    """From the Hugging Face folder and from the Orogen one, on one device and on a plan, as the decoded numbers."""
    root, case = cases("super")
    whole = open_model(root / "hf")
    split = open_model(root / "ours", PlanConfig(tensor=2, expert=2, dispatch="allgather"), "bfloat16")
    assert whole.config == split.config and whole.config.layers.mtp == "*E"
    embedding, mamba, experts = ("embedding", "weight"), ("mixer", "x"), ("mixer", "experts", "down")
    for opened, dtype in ((whole, np.float32), (split, BF16)):
        flat = {path: leaf.get_value() for path, leaf in opened.params.flat_state()}
        find = lambda end, flat=flat: {p: a for p, a in flat.items() if p[-len(end) :] == end and "mtp" not in p}  # noqa: E731
        assert np.array_equal(flat[embedding], case.decoded["backbone.embeddings.weight"].astype(dtype))
        fused = [case.decoded[f"backbone.layers.{n}.mixer.in_proj.weight"][40:80].T.astype(dtype) for n in (0, 2, 6)]
        assert sorted(a.tobytes() for a in map(np.asarray, find(mamba).values())) == sorted(a.tobytes() for a in fused)
        down = [f"backbone.layers.1.mixer.experts.{e}.down_proj.weight" for e in range(6)]
        stacked = np.stack([case.decoded[name].T.astype(dtype) for name in down])
        assert any(np.array_equal(np.asarray(a), stacked) for a in find(experts).values())


def test_commands_convert_a_quantised_folder(cases, tmp_path):
    root, case = cases("nano FP8")
    assert main(["convert", "from-hf", str(root / "hf"), str(tmp_path / "ours")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "ours"), str(tmp_path / "plain"), "--dtype", "float16"]) == 0
    assert same(read(tmp_path / "back"), case.tensors)
    head = read(tmp_path / "plain")["lm_head.weight"]
    assert head.dtype == np.float16
    np.testing.assert_array_equal(head, case.decoded["lm_head.weight"].astype(np.float16))


def test_a_damaged_file_is_named(cases, tmp_path):
    root, _ = cases("nano FP8")
    shutil.copytree(root / "ours", tmp_path / "ours")
    file = tmp_path / "ours" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        export(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_training_from_it_forgets_the_quantisation(cases, tmp_path):
    root, case = cases("super")
    for source in ("hf", "ours"):
        (tmp_path / source).mkdir()
        with open_folder(root / source) as folder:
            folder.keep(tmp_path / source)
        kept = json.loads((tmp_path / source / "huggingface.json").read_text())
        assert kept == {"config": {k: v for k, v in case.config.items() if k != "quantization_config"}}


# Refusals


def refusal(case, tmp_path):
    """The message with which a folder is refused; nothing is left of the Orogen folder."""
    case.write(tmp_path / "hf")
    with pytest.raises(ConfigError) as error:
        from_hf(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists() and "\n" not in str(error.value)
    return str(error.value)


UP = "backbone.layers.4.mixer.up_proj"


def stated(case, **fields):
    case.other["quantization"].update(fields)
    return case


def without(case, *names):
    return case._replace(tensors={name: a for name, a in case.tensors.items() if name not in names})


def with_tensors(case, tensors):
    return case._replace(tensors=case.tensors | tensors)


def excluding(case, module):
    return stated(case, exclude_modules=[*case.other["quantization"]["exclude_modules"], module])


WHERE = "hf_quant_config.json: quantization"
PLAIN = "F8_E4M3; expected an unquantised tensor, since"
WRONG = [
    (lambda: excluding(nano(), UP), f"{UP}.weight is {PLAIN} {WHERE} excludes it"),
    (lambda: excluding(nano(), "backbone.layers.4*"), f"{UP}.weight is {PLAIN} {WHERE} excludes it"),
    (lambda: excluding(nano(), "backbone.layers.4"), f"{UP}.weight is {PLAIN} {WHERE} excludes it"),
    (
        lambda: stated(nano(), quant_algo="MIXED_PRECISION", quantized_layers={}),
        f"backbone.layers.0.mixer.in_proj.weight is {PLAIN} {WHERE} does not name it",
    ),
    (
        lambda: with_tensors(nano(), {f"{UP}.weight": np.zeros((40, 32), BF16)}),
        f"{UP}.weight is BF16; expected a weight in fp8_tensor, since {WHERE} does not exclude it",
    ),
    (
        lambda: without(nano(), f"{UP}.weight_scale"),
        f"{UP}.weight_scale is missing; expected it for a weight in fp8_tensor",
    ),
    (
        lambda: without(nano("NVFP4"), f"{UP}.weight_scale_2"),
        f"{UP}.weight_scale_2 is missing; expected it for a weight in nvfp4",
    ),
    (
        lambda: stated(nano("NVFP4"), quant_algo="FP8"),
        "backbone.layers.0.mixer.in_proj.weight is U8; expected F8_E4M3 for a weight in fp8_tensor",
    ),
    (
        lambda: with_tensors(nano("NVFP4"), {f"{UP}.weight_scale": np.ones((40, 2), np.float32)}),
        f"{UP}.weight_scale is F32; expected F8_E4M3 for a weight in nvfp4",
    ),
    (
        lambda: with_tensors(nano("NVFP4"), {f"{UP}.weight_scale": np.ones((40, 3), E4M3)}),
        f"{UP}.weight_scale is [40, 3]; expected [40, 2] for [40, 32] in nvfp4",
    ),
    (
        lambda: with_tensors(nano("NVFP4"), {f"{UP}.weight_scale": np.ones(1, E4M3)}),
        f"{UP}.weight_scale is [1]; expected [40, 2] for [40, 32] in nvfp4",
    ),
    (
        lambda: with_tensors(nano("FP8_PER_CHANNEL_PER_TOKEN"), {f"{UP}.weight_scale": np.ones((), np.float32)}),
        f"{UP}.weight_scale is []; expected [40] for [40, 32] in fp8_channel",
    ),
    (
        lambda: with_tensors(nano(), {f"{UP}.weight": np.ones((40, 31), E4M3)}),
        f"{UP}.weight is [40, 31]; expected [40, 32] for [40, 32] in fp8_tensor",
    ),
    (
        lambda: with_tensors(nano(), {f"{UP}.weight_scale": np.ones(40, np.float32)}),
        f"{UP}.weight_scale is [40]; expected [] for [40, 32] in fp8_tensor",
    ),
    (
        lambda: with_tensors(nano(), {"backbone.layers.0.mixer.D_scale": np.ones(4, np.float32)}),
        "backbone.layers.0.mixer.D_scale is surplus",
    ),
    (
        lambda: with_tensors(nano(), {"lm_head.weight_scale": np.ones((), np.float32)}),
        "lm_head.weight_scale is surplus",
    ),
    (
        lambda: with_tensors(nano(), {f"{UP}.input_scale": np.ones((), E4M3)}),
        f"{UP}.input_scale is F8_E4M3; expected a scale in F32, F16 or BF16",
    ),
    (
        lambda: stated(nano(), quant_algo="NVFP4_AWQ"),
        f"{WHERE}.quant_algo is 'NVFP4_AWQ'; expected one of FP8, FP8_PER",
    ),
    (lambda: stated(nano(), quant_algo=None), f"{WHERE}.quant_algo is None; expected one of FP8"),
    (lambda: stated(nano("NVFP4"), group_size=32), f"{WHERE}.group_size is 32; expected 16, as NVFP4 defines it"),
    (
        lambda: stated(nano(), kv_cache_quant_algo="INT8"),
        f"{WHERE}.kv_cache_quant_algo is 'INT8'; expected null or one",
    ),
    (lambda: stated(nano(), exclude_modules="lm_head"), f"{WHERE}: exclude_modules is 'lm_head'; expected a list"),
    (lambda: nano()._replace(other={}), "hf_quant_config.json: quantization is missing; expected an object"),
    (
        lambda: stated(nano(), quant_algo="MIXED_PRECISION", quantized_layers={"lm_head": {"quant_algo": "int4"}}),
        f"{WHERE}.quantized_layers.lm_head.quant_algo is 'INT4'; expected one of FP8",
    ),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_what_modelopt_says_must_fit_the_tensors(make, message, tmp_path):
    assert message in refusal(make(), tmp_path)


def test_two_descriptions_must_agree(tmp_path):
    case = super_mixed()
    layers = dict(case.other["quantization"]["quantized_layers"])
    layers["backbone.layers.3.mixer.o_proj"] = {"quant_algo": "FP8_PB_WO"}
    one = {"backbone.layers.3.mixer.o_proj.weight_scale": np.ones((), np.float32)}  # a scale that fits both
    case = stated(with_tensors(case, one), quantized_layers=layers)
    expected = (
        "config.json: quantization_config and hf_quant_config.json: quantization differ; expected the same formats"
    )
    assert refusal(case, tmp_path).endswith(expected)


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": GROUP}}


def group(**weights):
    return COMPRESSED | {"config_groups": {"g": GROUP | {"weights": GROUP["weights"] | weights}}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method is 'gptq'; expected one of modelopt, compressed"),
        (COMPRESSED | {"format": "pack-quantized"}, "format is 'pack-quantized'; expected one of float-quantized"),
        (group(num_bits=4, type="int"), "g.weights.num_bits is '4 of type int'; expected a float of 8 or 4 bits"),
        (
            group(strategy="token"),
            "g.weights.strategy is 'token'; expected tensor, channel, block with block",
        ),
        (
            group(strategy="block"),
            "g.weights.strategy is 'block'; expected tensor, channel, block with block",
        ),
        (group(symmetric=False), "g.weights.symmetric is False; expected true"),
        (group(num_bits=True), "g.weights.num_bits is True; expected a whole number"),
        (
            COMPRESSED | {"format": "nvfp4-pack-quantized"} | {"config_groups": {"g": GROUP}},
            "g.weights.num_bits is '8 of type float'; expected a float of 8 or 4 bits that nvfp4-pack",
        ),
        (COMPRESSED | {"ignore": ["re:("]}, "the pattern 're:(' is not valid"),
        (
            COMPRESSED | {"ignore": ["re:(a+)+b"]},
            "the pattern is 're:(a+)+b'; expected at most 1000",
        ),
        (
            COMPRESSED | {"transform_config": {"r": {"type": "hadamard"}}},
            "transform_config is {'r': {'type'",
        ),
        (
            COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config.format is 'sparse-24-bitmask'; expected 'dense'",
        ),
        (group(strategy="block", block_structure="128x"), "g.weights.strategy is 'block'; expected tensor, channel"),
        (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "kv_cache_scheme is {'num_bits': 8"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size is [128]; expected a list of 2"),
        ([1], "quantization_config.quant_method is [1]; expected one of modelopt"),
    ],
)
def test_formats_that_are_not_implemented_are_refused_by_name(config, message):
    with pytest.raises(ConfigError) as error:
        read_quantization({"quantization_config": config})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_older_files_and_their_defaults_say_is_read():
    """compressed-tensors' own defaults of a sparsity that stores every number, and a block as text."""
    dense = {"format": "dense", "registry_requires_subclass": False, "sparsity_structure": "unstructured",
             "global_sparsity": 0.14, "targets": ["Linear"], "ignore": []}  # fmt: skip
    blocks = group(strategy="block", block_structure="128x64") | {"sparsity_config": dense}
    [found] = read_quantization({"quantization_config": blocks})
    assert found.targets[0][1] is not None and found.targets[0][1].block == (128, 64)


MANY = "re:" + ".*" * 30 + "!"  # each star multiplies the time by the length of a name


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("re:(", "the pattern 're:(' is not valid"),
        ("re:(a+)+b", "the pattern is 're:(a+)+b'; expected at most 1000 characters, no repeated groups"),
        (MANY, "at most two of * + {"),
        ("re:" + ".?" * 30 + "!", "alternatives"),
        ("re:" + "(.|.)" * 30 + "!", "alternatives"),
        ("re:(?x)(a+) +b", "no flags"),
    ],
)
def test_every_pattern_is_checked_whatever_the_method(pattern, message):
    mixed = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for config in (
        mixed | {"quantized_layers": {pattern: {"quant_algo": "FP8"}}},
        mixed | {"quantized_layers": {}, "ignore": [pattern]},
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": [pattern]},
        fp8 | {"modules_to_not_convert": [pattern]},
        COMPRESSED | {"config_groups": {"g": GROUP | {"targets": [pattern]}}},
    ):
        with pytest.raises(ConfigError) as error:
            read_quantization({"quantization_config": config})
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    [r"re:.*\.(q|k|v|o)_proj$", r"re:^model\.layers\.(?:0|1|47)\..*[.*+]?gate_up$", "re:.*lm_head", r"re:a\*\+*"],
)
def test_patterns_that_name_modules_are_taken(pattern):
    (found,) = read_quantization({"quantization_config": COMPRESSED | {"ignore": [pattern]}})
    assert found.ignored == (pattern,)


def test_targets_and_ignored_modules_are_matched_as_compressed_tensors_does(tmp_path):
    """An exact name wins over a pattern, a pattern over the class; `ignore` over all of them."""
    by_class, by_pattern = GROUP, GROUP | {"targets": [r"re:.*self_attn\.[qk]_proj$"]}
    by_pattern = by_pattern | {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
    by_name = {"targets": ["model.layers.0.self_attn.q_proj"], "weights": None}
    groups = {"g0": by_class, "g1": by_pattern, "g2": by_name}
    (found,) = read_quantization(
        {"quantization_config": COMPRESSED | {"config_groups": groups, "ignore": ["re:.*gate$", "lm_head"]}}
    )
    kind = lambda module, linear=True: getattr(found.scheme(module, linear=linear), "kind", None)  # noqa: E731
    assert kind("model.layers.1.mlp.up_proj") == "fp8_channel" and kind("model.layers.1.mlp.norm", False) is None
    assert kind("model.layers.1.self_attn.q_proj") == "fp8_tensor"
    assert kind("model.layers.0.self_attn.q_proj") is None and kind("model.layers.0.mlp.gate") is None
    assert kind("lm_head") is None and kind("lm_heads") == "fp8_channel"
    case = compressed("float-quantized", "channel", compressed_rows)
    case.config["quantization_config"]["ignore"].append("re:.*layers.2.mlp")
    assert "model.layers.2.mlp.up_proj.weight is F8_E4M3; expected an unquantised tensor" in refusal(case, tmp_path)
