"""A GPU to compile for where there is none."""

import importlib.util
from types import SimpleNamespace

import jax
import pytest
from tests.helpers import bound, hybrid, run_config, write_recipe

from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.parallel.plan import make_plan
from orogen.parallel.target import CAPABILITIES, compute_capability, platform
from orogen.simulate import target
from orogen.simulate.compiled import apart, compare, compared_lines, whole
from orogen.simulate.hardware import KINDS
from orogen.simulate.prediction import StageMemory
from orogen.simulate.target import CHIPS, LIMITS, check_target, description, traced_for

ON_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what happens without a GPU")
COMPILES = any(map(importlib.util.find_spec, target.PLUGINS))
EXTRA = "needs the extra cuda, whose XLA compiles for GPUs without one: pip install 'orogen[cuda]'"
NEEDS_PLUGIN = pytest.mark.skipif(not COMPILES, reason=EXTRA)


def card(name: str, cores: int = 132) -> SimpleNamespace:
    """A device as topologies of jax have it."""
    kind = CHIPS[name].name
    return SimpleNamespace(device_kind=kind, core_count=cores, compute_capability=CAPABILITIES[kind])


def test_a_card_is_described_from_its_hardware():
    lines = description(KINDS["h100"], cudnn=(9, 28, 1), cuda=(13, 0, 0)).splitlines()
    fields = dict(line.strip().split(": ", 1) for line in lines[1:-5])
    assert fields["core_count"] == "132"
    assert fields["memory_bandwidth"] == "3350000000000"
    assert fields["device_memory_size"] == str(int(79.1 * 2**30))
    # As XLA's own description of an H100 has them.
    assert fields["shared_memory_per_core"] == "233472"
    assert fields["shared_memory_per_block_optin"] == "232448"
    assert fields["l2_cache_size"] == "52428800"
    assert lines[-5] == "}"
    assert "dnn_version_info { major: 9 minor: 28 patch: 1 }" in lines
    assert lines[-1] == 'device_description_str: "NVIDIA H100 80GB HBM3"'


@pytest.mark.parametrize("name", CHIPS)
def test_every_card_has_what_its_description_needs(name):
    assert CAPABILITIES[CHIPS[name].name] in LIMITS
    text = description(KINDS[name], cudnn=(9, 0, 0), cuda=(13, 0, 0))
    # Kernels that need instructions of one architecture alone exist since Hopper.
    assert ("ACCELERATED_FEATURES" in text) == (name != "a100")


@pytest.mark.parametrize("name", sorted(KINDS.keys() - CHIPS.keys()))
def test_hardware_that_is_no_known_gpu_is_refused(name):
    with pytest.raises(ConfigError, match=f"hardware is '{name}'; expected one of a100, h100, h200, gb200, gb300"):
        check_target(KINDS[name])


@ON_CPU
def test_what_is_traced_is_for_the_card_named():
    model, devices = hybrid(), jax.devices()
    config = PlanConfig(**{field: kernel for field, kernel in FOR_GPU.items() if field != "quantize"})
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        make_plan(config, model)
    with traced_for(card("h200")):
        assert (platform(), compute_capability()) == ("gpu", "9.0")
        assert make_plan(config, model, devices=devices[-1:]).mesh.devices.item() == devices[-1]
    with traced_for(card("gb200")), pytest.raises(ConfigError, match="blocks on a GPU of compute capability 10.0"):
        make_plan(config, model, devices=devices)
    assert (platform(), compute_capability()) == ("cpu", None)


def test_the_fullest_stage_is_that_without_what_no_compiler_sees():
    stages = [
        StageMemory(0, {"activations": 4.0, "workspace": 9.0}, 0.0),
        StageMemory(1, {"activations": 7.0, "workspace": 1.0}, 0.0),
    ]
    assert apart(stages) == ({"activations": 7.0}, 1.0)


def test_a_card_that_is_not_this_process_s_is_the_target_beside_a_gpu(monkeypatch):
    own = SimpleNamespace(device_kind="NVIDIA A100-SXM4-80GB", compute_capability="8.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [own])
    assert compute_capability() == "8.0"
    with traced_for(card("h200")):
        assert (platform(), compute_capability()) == ("gpu", "9.0")
    with traced_for(card("a100")):
        assert compute_capability() == "8.0"
    unknown = SimpleNamespace(device_kind="NVIDIA T1000", core_count=14, compute_capability="7.5")
    with traced_for(unknown), pytest.raises(KeyError, match="NVIDIA T1000"):
        compute_capability()


@pytest.mark.parametrize("other", ["--search", "--inference"])
def test_a_compiled_step_is_not_of_a_search_or_of_serving(tmp_path, capsys, other):
    assert main(["simulate", "--gin_file", str(write_recipe(tmp_path)), "--compile", other]) == 2
    assert capsys.readouterr().err.endswith(f"--compile is 'cpu'; expected it without {other}\n")


def test_a_compiled_step_without_the_plugin_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(target, "PLUGINS", ("no_such_plugin",))
    recipe = str(write_recipe(tmp_path))
    assert main(["simulate", "--gin_file", recipe, "--compile", "gpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["simulate", "--gin_file", recipe, "--compile", "gpu", *bound("ClusterConfig.hardware='cpu'")]) == 2
    assert "expected one of a100" in capsys.readouterr().err


@NEEDS_PLUGIN
def test_a_step_is_compiled_with_the_kernels_of_a_gpu():
    """Two devices, in bfloat16, with every kernel."""
    model = hybrid(pattern="M*E", head_dim=8, mamba_head_dim=16, ssm_state_size=16, mtp_depths=0, chunk_size=16)
    kernels = {field: kernel for field, kernel in FOR_GPU.items() if field != "quantize"}
    plan = {"data": 2, "fsdp": "optimizer", "expert": 2, "dispatch": "ragged", "buffer_factor": 2.0, **kernels}
    facts = compare(run_config(model, plan=plan, sequence_length=64, compute_dtype="bfloat16"), KINDS["h200"])
    assert "for NVIDIA H200" in compared_lines(facts)[0]
    state, compiled = facts["memory"]["state"], facts["memory"]["compiled"]
    # The state is an argument; so is the batch: tokens, segments, positions and weights of two rows, and small counts.
    assert compiled["arguments"] == pytest.approx(state["parameters"] + state["optimizer"] + 4 * 4 * 2 * 64, abs=2048)
    assert whole(facts["memory"])[1] > state["parameters"] + state["optimizer"] + state["gradients"]
