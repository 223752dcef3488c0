"""Hugging Face to Orogen and back is exact to the bit, streams, and leaves nothing when it is interrupted."""

import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tests.convert.synthetic import CASES, read, same, shapes, write

from orogen.checkpoint.leaves import dotted
from orogen.checkpoint.open import open_model
from orogen.checkpoint.transfer import export, from_hf
from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.convert import names, tensor_files
from orogen.convert.config import read_config
from orogen.convert.tensor_files import Spec, TensorReader, TensorWriter
from orogen.model.lm import build

WITH_MTP = (("nemotron_h", True), ("deepseek_v3", True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("case", "mtp"), [*((case, False) for case in CASES), *WITH_MTP])
def test_round_trip_is_exact(tmp_path, case, mtp, dtype):
    config, tensors = shapes(case, mtp=mtp)
    before = write(tmp_path / "hf", config, tensors, dtype)
    from_hf(tmp_path / "hf", tmp_path / "ours")
    assert (load([tmp_path / "ours" / "config.gin"])[0].model.layers.mtp != "") == mtp
    export(tmp_path / "ours", tmp_path / "back")
    assert same(before, read(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config | {"dtype": dtype}


def test_shards_are_read_and_written(tmp_path, monkeypatch):
    config, tensors = shapes("nemotron_h")
    before = write(tmp_path / "hf", config, tensors)
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(TensorWriter.__init__, "__kwdefaults__", {"shard_bytes": 20_000})
    from_hf(tmp_path / "hf", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert same(before, read(tmp_path / "back"))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in before.values())
    from_hf(tmp_path / "back", tmp_path / "again")
    assert same(read(tmp_path / "ours"), read(tmp_path / "again"))


def test_parameters_are_the_models_and_keep_their_dtype(tmp_path):
    before = write(tmp_path / "hf", *shapes("nemotron_h", mtp=True))
    from_hf(tmp_path / "hf", tmp_path / "ours")
    config = load([tmp_path / "ours" / "config.gin"])[0].model
    built = build(config)
    states = {dotted(p): v for s in (built.params, built.buffers) for p, v in nnx.to_flat_state(s)}
    ours = read(tmp_path / "ours")
    assert {n: a.shape for n, a in ours.items()} == {n: v.get_value().shape for n, v in states.items()}
    assert {n for n, a in ours.items() if a.dtype == np.float32} == {n for n in ours if n.endswith("router.bias")}
    # By hand: `MEM*-EME/*E` repeats nothing but in MTP, and layer 0's in_proj is z | x | B | C | dt of 40 40 12 12 4.
    fused = before["backbone.layers.0.mixer.in_proj.weight"]
    np.testing.assert_array_equal(ours["backbone.children.0.mixer.x"], fused[40:80].T)
    np.testing.assert_array_equal(ours["backbone.children.0.mixer.dt"], fused[104:108].T)
    expert = before["backbone.layers.1.mixer.experts.3.up_proj.weight"]
    np.testing.assert_array_equal(ours["backbone.children.1.mixer.experts.up"][3], expert.T)


def test_fused_tensors_are_split_in_the_right_places(tmp_path):
    """kv_b by head, c_attn by column block, gpt-oss's interleaved gate and up, Mamba-1's x_proj by rows."""
    found = {}
    for case in ("deepseek_v3", "gpt2", "gpt_oss", "mamba"):
        before = write(tmp_path / case, *shapes(case))
        from_hf(tmp_path / case, tmp_path / f"{case}_ours")
        found[case] = before, read(tmp_path / f"{case}_ours")
    before, ours = found["deepseek_v3"]
    heads = before["model.layers.0.self_attn.kv_b_proj.weight"].reshape(4, 5 + 7, 10)  # heads, nope + value, latent
    np.testing.assert_array_equal(ours["backbone.children.0.mixer.key_up"], heads[:, :5].reshape(20, 10).T)
    np.testing.assert_array_equal(ours["backbone.children.0.mixer.value_up"], heads[:, 5:].reshape(28, 10).T)
    down = before["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    np.testing.assert_array_equal(ours["backbone.children.0.mixer.key_rope"], down[10:].T)
    before, ours = found["gpt2"]
    columns = before["transformer.h.1.attn.c_attn.weight"]
    np.testing.assert_array_equal(ours["backbone.children.0.children.0.mixer.value"][1], columns[:, 64:])
    np.testing.assert_array_equal(ours["backbone.children.0.children.1.mixer.down"][2], before["transformer.h.2.mlp.c_proj.weight"])  # fmt: skip # noqa: E501
    before, ours = found["gpt_oss"]
    interleaved = before["model.layers.3.mlp.experts.gate_up_proj"]  # `wE*E` twice: layer 3 ends the second repetition
    path = "backbone.children.0.children.3.mixer.experts"
    np.testing.assert_array_equal(ours[f"{path}.gate"][1], interleaved[..., 0::2])
    np.testing.assert_array_equal(ours[f"{path}.up"][1], interleaved[..., 1::2])
    before, ours = found["mamba"]
    fused = before["backbone.layers.2.mixer.x_proj.weight"]  # rank 3, B and C of 6 states
    for name, block in {"dt_down": fused[:3], "B": fused[3:9], "C": fused[9:]}.items():
        np.testing.assert_array_equal(ours[f"backbone.children.0.children.0.mixer.{name}"][2], block.T)


def test_mixed_dtypes_come_back_as_they_were(tmp_path):
    config, tensors = shapes("mamba2")
    before = write(tmp_path / "hf", config, tensors)
    name = "backbone.layers.1.mixer.A_log"  # stacked with two that stay bfloat16
    before[name] = np.full(before[name].shape, 1.001, np.float32)
    save_file(before, tmp_path / "hf" / "model.safetensors")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert same(before, read(tmp_path / "back"))


def test_a_requested_dtype_leaves_correction_biases_alone(tmp_path):
    before = write(tmp_path / "hf", *shapes("nemotron_h"), "float32")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", dtype="bfloat16")
    for name, array in read(tmp_path / "back").items():
        wide = name.endswith("e_score_correction_bias")
        expected = before[name] if wide else before[name].astype(jnp.bfloat16)
        assert same({"": array}, {"": expected}), name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_mtp_block_that_the_files_lack_is_left_out(tmp_path):
    config, tensors = shapes("nemotron_h")
    config["num_nextn_predict_layers"] = 1  # what transformers writes after it has dropped the block
    before = write(tmp_path / "hf", config, tensors)
    from_hf(tmp_path / "hf", tmp_path / "ours")
    assert load([tmp_path / "ours" / "config.gin"])[0].model.mtp_depths == 0
    export(tmp_path / "ours", tmp_path / "back")
    assert same(before, read(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_old_names_and_buffers_of_gpt2_are_understood(tmp_path):
    config, tensors = shapes("gpt2")
    before = write(tmp_path / "hf", config, tensors)
    old = {name.removeprefix("transformer."): array for name, array in before.items()}
    old["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    save_file(old | {"lm_head.weight": before["transformer.wte.weight"]}, tmp_path / "hf" / "model.safetensors")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert same(before | {"lm_head.weight": before["transformer.wte.weight"]}, read(tmp_path / "back"))


# Refusals


def refusal(folder, target) -> str:
    """Why a folder is refused; nothing may have been written."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ConfigError) as error:
        from_hf(folder, target)
    assert sorted(folder.parent.rglob("*")) == before
    return str(error.value).removeprefix(f"{folder} ")


def test_every_wrong_tensor_is_listed(tmp_path):
    config, tensors = shapes("mixtral")
    before = write(tmp_path / "hf", config, tensors)
    del before["model.norm.weight"], before["model.layers.2.self_attn.k_proj.weight"]
    before["model.layers.0.self_attn.q_proj.bias"] = np.ones(48, np.float32)
    before["lm_head.weight"] = np.ones((95, 32), np.float32)
    save_file(before, tmp_path / "hf" / "model.safetensors")
    assert refusal(tmp_path / "hf", tmp_path / "ours") == (
        "does not hold the model of its config: model.layers.2.self_attn.k_proj.weight is missing; "
        "model.norm.weight is missing; model.layers.0.self_attn.q_proj.bias is surplus; "
        "lm_head.weight is [95, 32], expected [96, 32]"
    )


def test_copies_that_differ_are_refused(tmp_path):
    config, tensors = shapes("deepseek_v3", mtp=True)
    before = write(tmp_path / "hf", config, tensors)
    before["model.layers.4.shared_head.head.weight"] = before["lm_head.weight"] * 2
    save_file(before, tmp_path / "hf" / "model.safetensors")
    message = refusal(tmp_path / "hf", tmp_path / "ours")
    assert message.endswith(
        "model.layers.4.shared_head.head.weight is not equal to lm_head.weight; expected a copy of it"
    )


def test_truncated_files_are_refused(tmp_path):
    write(tmp_path / "hf", *shapes("mixtral"))
    file = tmp_path / "hf" / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "truncated" in refusal(tmp_path / "hf", tmp_path / "ours")
    file.write_bytes(b"\x10" + bytes(7) + b"not json at all!")
    assert "has no safetensors header" in refusal(tmp_path / "hf", tmp_path / "ours")
    file.unlink()
    assert "has no safetensors files" in refusal(tmp_path / "hf", tmp_path / "ours")


def test_quantised_and_missing_folders_are_refused(tmp_path):
    config, tensors = shapes("mixtral")
    before = write(tmp_path / "hf", config, tensors)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    expected = "expected one of modelopt, compressed-tensors, fp8"
    assert refusal(tmp_path / "hf", tmp_path / "ours") == (
        f"config.json: quantization_config.quant_method is None; {expected}"
    )
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    before["model.norm.weight"] = before["model.norm.weight"].astype(jnp.float8_e4m3fn)
    save_file(before, tmp_path / "hf" / "model.safetensors")
    assert "model.norm.weight is F8_E4M3; expected one of F64, F32, F16, BF16" in refusal(
        tmp_path / "hf", tmp_path / "ours"
    )
    assert "has no config.json; expected a Hugging Face folder" in refusal(tmp_path / "none", tmp_path / "ours")


def test_a_folder_that_exists_is_not_overwritten(tmp_path):
    write(tmp_path / "hf", *shapes("mixtral"))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").touch()
    assert refusal(tmp_path / "hf", tmp_path / "ours") == f"{str(tmp_path / 'ours')!r} exists; expected a new folder"


# Interruptions


def test_an_error_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path / "hf", *shapes("nemotron_h"))
    from_hf(tmp_path / "hf", tmp_path / "ours")
    written = iter(range(20))
    plain = TensorWriter.write

    def failing(self, *arguments):
        if next(written, None) is None:
            raise OSError(28, "No space left on device")
        plain(self, *arguments)

    monkeypatch.setattr(TensorWriter, "write", failing)
    before = sorted(tmp_path.rglob("*"))
    for convert, source in ((from_hf, tmp_path / "hf"), (export, tmp_path / "ours")):
        written = iter(range(20))
        with pytest.raises(OSError, match="No space left"):
            convert(source, tmp_path / "target")
        assert sorted(tmp_path.rglob("*")) == before


SLOW = """
import sys, time
from pathlib import Path
from orogen.checkpoint import transfer
from orogen.convert import tensor_files
plain = tensor_files.TensorWriter.write
def slow(self, *arguments):
    plain(self, *arguments)
    print("written", flush=True)
    time.sleep(0.2)
transfer.TensorWriter.write = slow
transfer.from_hf(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_kill_leaves_nothing_that_loads_and_the_next_try_succeeds(tmp_path):
    write(tmp_path / "hf", *shapes("nemotron_h"))
    command = [sys.executable, "-c", SLOW, str(tmp_path / "hf"), str(tmp_path / "ours")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ)
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "ours").exists()
    (left,) = (path for path in tmp_path.iterdir() if path.name != "hf")
    with pytest.raises(ConfigError, match=r"has no config.gin and no config.json"):
        open_model(left)
    from_hf(tmp_path / "hf", tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]
    assert open_model(tmp_path / "ours").config == read_config(shapes("nemotron_h")[0])[1]


# Memory


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """The peak of traced allocations is that of one tensor and its copy."""
    import tracemalloc

    size, vocabulary = 256, 20_000
    config, tensors = shapes("mamba2")
    config |= {"hidden_size": size, "vocab_size": vocabulary, "expand": 1, "num_heads": 32}
    tensors = {n: s.shape for n, s in names.table(*read_config(config)).items()}
    write(tmp_path / "hf", config, tensors)
    largest = 2 * size * vocabulary
    for convert, source, target in ((from_hf, "hf", "ours"), (export, "ours", "back")):
        tracemalloc.start()
        convert(tmp_path / source, tmp_path / target)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert largest < peak < 2.5 * largest, (convert, peak / largest)


def test_parts_of_a_tensor_come_back_in_any_order(tmp_path):
    draw = np.random.default_rng(0)
    arrays = {"a": draw.normal(size=(3, 2, 5, 7)).astype(jnp.bfloat16), "b": draw.normal(size=(4,)).astype(np.float32)}
    specs = {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}
    with TensorWriter(tmp_path, specs) as writer:
        for index in reversed(list(np.ndindex(3, 2))):
            writer.write("a", np.asfortranarray(arrays["a"][index]), index)
        writer.write("b", arrays["b"].astype(np.float64))
    assert same(arrays, read(tmp_path))
    with TensorReader(tmp_path) as reader:
        assert same({"": reader.read("a", (2, 1))}, {"": arrays["a"][2, 1]})
        assert same({"": reader.read("a", (1,))}, {"": arrays["a"][1]})
        assert not reader.equal("a", "b") and reader.equal("a", "a")


# Dtypes


OVERFLOWS = [
    ("float32", "float16", 7e4), ("float32", "float16", -65520.0), ("float32", "bfloat16", 3.4e38),
    ("bfloat16", "float16", 1e5), ("float64", "float32", 1e39), ("float64", "bfloat16", -3.4e38),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "wanted", "value"), OVERFLOWS)
def test_a_number_too_large_for_the_target_is_refused_by_name(tmp_path, dtype, wanted, value):
    before = write(tmp_path / "hf", *shapes("gpt_oss"), "float32")
    name = "model.layers.2.mlp.experts.gate_up_proj"
    before = {n: a.astype(jnp.dtype(dtype)) for n, a in before.items()}
    before[name][3, 5, 7] = value
    save_file(before, tmp_path / "hf" / "model.safetensors")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    with pytest.raises(ConfigError) as error:
        export(tmp_path / "ours", tmp_path / "back", dtype=wanted)
    assert str(error.value).startswith(
        f"{name} holds {float(before[name][3, 5, 7]):.6g}; expected finite numbers of {wanted}"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def test_the_largest_numbers_and_those_that_are_not_finite_are_kept(tmp_path):
    before = write(tmp_path / "hf", *shapes("mamba2"), "float32")
    name = "backbone.norm_f.weight"
    before[name][:5] = [65504.0, -65519.0, np.inf, -np.inf, np.nan]  # -65519 rounds to float16's least, -65504
    save_file(before, tmp_path / "hf" / "model.safetensors")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", dtype="float16")
    expected = [65504, -65504, np.inf, -np.inf, np.nan]
    np.testing.assert_array_equal(read(tmp_path / "back")[name][:5].astype(np.float64), expected)


def test_float64_that_float32_cannot_hold_is_not_loaded(tmp_path):
    before = write(tmp_path / "hf", *shapes("mixtral"), "float32")
    before["model.norm.weight"] = before["model.norm.weight"].astype(np.float64) * 1e39
    save_file(before, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"norm.weight holds .*; expected finite numbers of float32, of which 3.40282e"
    ):
        open_model(tmp_path / "hf")


@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int64, np.float32, jnp.float8_e4m3fn])
@pytest.mark.parametrize("case", ["gpt2", "mixtral"])
def test_buffers_without_parameters_may_have_any_dtype(tmp_path, case, kind):
    config, tensors = shapes(case)
    before = write(tmp_path / "hf", config, tensors)
    buffers = {
        "gpt2": ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
        "mixtral": ["model.layers.1.self_attn.rotary_emb.inv_freq"],
    }[case]
    save_file(before | {n: np.ones((1, 3), kind) for n in buffers}, tmp_path / "hf" / "model.safetensors")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert same(before, read(tmp_path / "back"))
