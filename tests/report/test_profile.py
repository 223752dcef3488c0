"""The table of a step's time, on traces made by hand and on a real one of a CPU."""

import json
import re
from pathlib import Path

import pytest
from tests.report.traces import module, program, write_trace

import orogen.report.profile
from orogen.config.checks import ConfigError
from orogen.config.kinds import LAYERS, resolved
from orogen.report.profile import KINDS, PARTS, Scope, main, scope_of, step_table
from orogen.report.profile_page import lines
from orogen.report.trace import messages, read_program

BODY = "jit(step)/shard_map/while/body/closed_call/jit(gradient)"
STEP = program(
    "jit_step",
    (
        1,
        [
            ("loop_fusion.2", "fusion", f"{BODY}/jvp(MoE)/experts/mul", [7]),
            ("gemm", "custom-call", f"{BODY}/transpose(jvp(Mamba2))/ssd/dot_general", []),
            ("psum.4", "all-reduce-start", f"{BODY}/jvp(MoE)/router/psum", []),
            ("gather.9", "async-start", "", [8]),
            ("no_name", "fusion", "", [7]),
        ],
    ),
    (
        7,
        [
            ("a", "add", "jit(step)/optimizer/add", []),
            ("b", "multiply", f"{BODY}/jvp(Attention)/mul", []),
            ("c", "multiply", f"{BODY}/jvp(Attention)/sub", []),
        ],
    ),
    (8, [("inner", "all-gather", "jit(step)/gather_parameters/all_gather", [])]),
)  # fmt: skip


def kernel(stream, operation, start, end, name=None, **stats):
    found = {"hlo_op": operation, "hlo_module": "jit_step", "program_id": 3, **stats}
    return (f"Stream #{stream}(Kernel)", name or operation.replace(".", "_"), start, end, found)


def two_gpus(folder):
    """Two steps of 100 microseconds each, in one of which the devices differ.

    First step: MoE 0 to 30, all-reduce 20 to 60 on device 0 and 40 to 60 on device 1, Mamba-2 50 to 80.
    Second: MoE 100 to 120, all-gather 120 to 170 on both, Mamba-2 160 to 200.
    """
    events = {}
    for device, begin in enumerate((20, 40)):
        events[f"/device:GPU:{device}"] = [
            kernel(13, "loop_fusion.2", 0, 30),
            kernel(13, "gemm", 50, 80, "sm90_xmma_gemm"),
            kernel(17, "psum.4", begin, 60, "ncclDevKernel_AllReduce_Sum_f32_RING_LL(args)"),
            kernel(13, "loop_fusion.2", 100, 120),
            kernel(17, "gather.9", 120, 170, "kernel_without_a_known_name"),
            kernel(13, "gemm", 160, 200, "sm90_xmma_gemm"),
            # XLA repeats kernels by module and by scope, on lines of their own.
            ("XLA Modules", "jit_step", 0, 200, {}),
            ("Framework Name Scope", "MoE", 0, 30, {"hlo_op": "loop_fusion.2"}),
        ]
    return write_trace(folder, events, {"jit_step(3)": STEP})


def test_two_devices_by_hand(tmp_path):
    """In microseconds of both steps. Device 0 computes for 30 + 30 + 20 + 40, only communicates from 30 to 50 and from
    120 to 160, and is idle from 80 to 100; its all-reduce waits for device 1 from 20 to 40, which is exposed from 30.
    Device 1 only communicates from 40 to 50 and from 120 to 160, and is idle from 30 to 40 as well."""
    table = step_table(two_gpus(tmp_path), steps=2)
    assert table["devices"] == {
        "GPU:0": {
            "step_ms": 0.1, "compute_ms": 0.06, "exposed_ms": 0.03, "waiting_ms": 0.005, "hidden_ms": 0.015,
            "idle_ms": 0.01,
        },
        "GPU:1": {
            "step_ms": 0.1, "compute_ms": 0.06, "exposed_ms": 0.025, "waiting_ms": 0.0, "hidden_ms": 0.01,
            "idle_ms": 0.015,
        },
    }  # fmt: skip
    assert table["compute"] == [
        {"kind": "Mamba2", "part": "ssd", "phase": "backward", "ms": 0.035},
        {"kind": "MoE", "part": "experts", "phase": "forward", "ms": 0.025},
    ]
    gather, reduce = table["communication"]
    assert gather == {
        "operation": "all-gather", "kind": "gather_parameters", "part": "", "phase": "forward", "exposed_ms": 0.02,
        "waiting_ms": 0.0, "hidden_ms": 0.005, "count": 0.5,
    }  # fmt: skip
    assert reduce == {
        "operation": "all-reduce", "kind": "MoE", "part": "router", "phase": "forward", "exposed_ms": 0.0075,
        "waiting_ms": 0.0025, "hidden_ms": 0.0075, "count": 0.5,
    }  # fmt: skip
    json.dumps(table)


def test_a_step_is_what_the_rarest_instruction_of_the_largest_program_ran_once_in(tmp_path):
    """Three steps of a loop with two turns; a small program that ran once does not count."""
    events = [kernel(13, "loop_fusion.2", start, start + 5) for start in (0, 10, 40, 50, 80, 90)]
    events += [kernel(13, "gemm", start, start + 10) for start in (20, 60, 100)]
    events.append(kernel(13, "copy", 30, 34, hlo_module="jit_other", program_id=8))
    assert step_table(write_trace(tmp_path, {"/device:GPU:0": events}, {"jit_step(3)": STEP}))["steps"] == 3


def test_kernels_that_run_at_once_share_the_time(tmp_path):
    """From 10 to 20 two kernels run."""
    events = [kernel(13, "loop_fusion.2", 0, 20), kernel(14, "gemm", 10, 40)]
    table = step_table(write_trace(tmp_path, {"/device:GPU:0": events}, {"jit_step(3)": STEP}), steps=1)
    assert {row["kind"]: row["ms"] for row in table["compute"]} == {"MoE": 0.015, "Mamba2": 0.025}


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        (f"{BODY}/jvp(MoE)/router/dot_general", ("MoE", "router", "forward")),
        (f"{BODY}/transpose(jvp(MoE))/experts/while/body/add", ("MoE", "experts", "backward")),
        (f"{BODY}/transpose(jvp(jvp()))/checkpoint/Mamba2/ssd/mul", ("Mamba2", "ssd", "backward")),
        (
            f"{BODY}/transpose(jvp(jvp()))/checkpoint/rematted_computation/Mamba2/conv/jit(_where)/select_n",
            ("Mamba2", "conv", "recomputed"),
        ),
        (f"{BODY}/jvp(mtp_1)/Attention/mul", ("mtp_1 Attention", "", "forward")),
        (f"{BODY}/jvp(mtp_2)/dot_general", ("mtp_2 other", "", "forward")),
        ("jit(step)/optimizer/cond/branch_1_fun/add", ("optimizer", "", "forward")),
        ("jit(step)/conv/add", ("other", "", "forward")),  # a part of no layer
        ("", ("other", "", "forward")),
    ],
)
def test_scopes_of_op_names(op_name, scope):
    assert scope_of(op_name) == Scope(*scope)


def test_lines_of_text(tmp_path):
    text = lines(step_table(two_gpus(tmp_path), steps=2))
    assert text[:5] == [
        "2 steps; milliseconds per step", "",
        "device  step  compute  exposed  waiting  hidden  idle",
        "GPU:0   0.10     0.06     0.03     0.01    0.01  0.01",
        "GPU:1   0.10     0.06     0.03     0.00    0.01  0.01",
    ]  # fmt: skip
    assert "Mamba2   ssd      backward  0.035  35.0%" in text


def test_collectives_whose_runs_cannot_be_matched_do_not_wait(tmp_path):
    """A device that ran one more often may have begun any of them late."""
    events = {
        "/device:GPU:0": [kernel(17, "psum.4", 0, 30)],
        "/device:GPU:1": [kernel(17, "psum.4", 20, 30), kernel(17, "psum.4", 40, 50)],
    }
    table = step_table(write_trace(tmp_path, events, {"jit_step(3)": STEP}), steps=1)
    assert [row["waiting_ms"] for row in table["communication"]] == [0]
    assert [row["exposed_ms"] for row in table["communication"]] == [0.025]


def test_without_the_program_events_tell_their_own_path(tmp_path):
    """As on a GPU whose trace has no programs: the path, less what all paths of the module begin with; NCCL's kernels
    are known by their names, as are instructions of collectives."""
    own = {"hlo_module": "jit_f", "prefix": "jit(f)/"}
    events = [
        kernel(13, "fusion.1", 0, 10, **own, program_id=9),
        ("Stream #14(Kernel)", "ncclKernel_ReduceScatter_RING_LL_Sum", 10, 30, {"hlo_op": "wrapped", **own}),
        ("Stream #14(MemcpyP2P)", "MemcpyP2P", 30, 35, {"hlo_op": "collective-permute-start.2", **own}),
        ("Stream #13(Kernel)", "loop_fusion", 40, 45, {"hlo_op": "f.3", "name": "jvp(MLP)/down/mul", **own}),
    ]
    table = step_table(write_trace(tmp_path, {"/device:GPU:0": events}), steps=1)
    assert {(row["kind"], row["part"]): row["ms"] for row in table["compute"]} == {
        ("other", ""): 0.01, ("MLP", "down"): 0.005,
    }  # fmt: skip
    assert {row["operation"]: row["exposed_ms"] for row in table["communication"]} == {
        "reduce-scatter": 0.02, "collective-permute": 0.005,
    }  # fmt: skip


def test_an_instruction_without_an_op_name_has_the_commonest_inside_or_an_operands(tmp_path):
    written = [
        ("dot", "dot", f"{BODY}/jvp(MLP)/up/dot_general", []),
        ("copy.1", "copy", "", [], [1]),
        ("copy.2", "copy", "", [], [2]),
        ("fused", "fusion", "", [7], [1]),
    ]
    inside = [
        ("a", "add", f"{BODY}/jvp(MoE)/router/add", []),
        ("b", "add", f"{BODY}/jvp(Attention)/core/add", []),
        ("c", "add", f"{BODY}/jvp(Attention)/core/mul", []),
    ]
    names = read_program(module("jit_f", (1, written), (7, inside)))
    assert {name: scope_of(names[name].op_name).kind for name in ("copy.1", "copy.2", "fused")} == {
        "copy.1": "MLP", "copy.2": "MLP", "fused": "Attention",
    }  # fmt: skip


def test_a_cpu_reports_loops_and_their_instructions(tmp_path):
    """A loop's own event, from 0 to 100, covers those inside, which alone count; a device has several threads."""
    loop = program("jit_f", (1, [("while.3", "while", "jit(f)/while", []), ("dot", "dot", "jit(f)/jvp(MLP)/dot", [])]))
    stats = {"hlo_module": "jit_f", "program_id": 4}
    events = [
        ("worker/1", "while.3", 0, 100, {"hlo_op": "while.3", "device_ordinal": 1, **stats}),
        ("worker/1", "dot", 10, 20, {"hlo_op": "dot", "device_ordinal": 1, **stats}),
        ("worker/1", "end: dot", 20, 20, {"hlo_op": "dot", "device_ordinal": 1, **stats}),
        ("worker/2", "dot", 50, 60, {"hlo_op": "dot", "device_ordinal": 1, **stats}),
        ("worker/2", "ThunkExecutor::Execute", 0, 200, {}),
    ]
    table = step_table(write_trace(tmp_path, {"/host:CPU": events}, {"jit_f(4)": loop}), steps=1)
    assert table["devices"] == {
        "CPU:1": {
            "step_ms": 0.05, "compute_ms": 0.02, "exposed_ms": 0, "waiting_ms": 0, "hidden_ms": 0, "idle_ms": 0.03,
        },
    }  # fmt: skip


def test_the_last_trace_of_a_folder_is_read(tmp_path):
    for name, end in (("2026_01_02", 10), ("2026_01_03", 20)):
        events = {"/device:GPU:0": [kernel(13, "gemm", 0, end)]}
        folder = write_trace(tmp_path / name, events) / "plugins" / "profile"
        (tmp_path / "profile").mkdir(exist_ok=True)
        (folder / "2026_01_02").rename(tmp_path / "profile" / name)
    assert step_table(tmp_path / "profile", steps=1)["devices"]["GPU:0"]["step_ms"] == 0.02


def test_the_command(tmp_path, capsys):
    folder = str(two_gpus(tmp_path))
    assert main([folder, "2"]) == 0
    assert capsys.readouterr().out.splitlines() == lines(step_table(tmp_path, steps=2))
    for arguments, message in (
        ([], "arguments ''; expected TRACE_DIR [STEPS]"),
        ([folder, "0"], f"arguments '{folder} 0'; expected TRACE_DIR [STEPS]"),
        ([f"{folder}/none"], f"{folder}/none; expected a folder with a trace (*.xplane.pb)"),
    ):
        assert main(arguments) == 2
        assert capsys.readouterr() == ("", f"orogen: {message}\n")


def test_folders_without_a_trace_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected a folder with a trace"):
        step_table(tmp_path)
    with pytest.raises(ConfigError, match="expected a trace with events of devices"):
        step_table(write_trace(tmp_path, {"/host:CPU": [("python", "call", 0, 5, {})]}))


@pytest.mark.parametrize("damaged", [b"\x0a\x05ab", b"\x80", b"\x0b", b"\x09\x01"])
def test_what_is_no_protocol_buffer_is_an_error(damaged):
    with pytest.raises(ValueError, match="not a protocol buffer"):
        list(messages(damaged))


def test_every_scope_of_the_code_is_known():
    """A scope that the table does not know would count as its surroundings."""
    source = Path(orogen.report.profile.__file__).parents[1]
    text = "".join(file.read_text() for file in source.rglob("*.py"))
    scopes = set(re.findall(r'jax\.named_scope\("(\w+)"\)', text))
    built = (resolved(kind.mixer) for kind in LAYERS.values())
    mixers = {mixer.__name__ for mixer in built if isinstance(mixer, type)} | {"MLP"}
    assert scopes | mixers == set(KINDS) | set(PARTS)
