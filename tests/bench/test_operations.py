"""Benchmarks of single operations at tiny sizes: checks before timing, costs, refusals and plots; none checks speed."""

import argparse
import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest

from orogen.bench import attention, command, grouped_matmul, operation, ssd, timing, train_peer
from orogen.bench.operation import bench, read_shape, relative_error
from orogen.bench.roofline import draw_roofline
from orogen.config.checks import ConfigError

CEILINGS = {"matrix": 16, "copied": 64}
TINY = {
    "grouped_matmul": ("n=200,d=24,f=16,e=5,empty=2", "blocks", ["forward", "gradient_rows", "gradient_weights"]),
    "attention": ("b=2,t=24,h=4,g=2,k=8,documents=23+1", "blocked", ["forward", "forward_backward"]),
    "ssd": ("b=2,t=24,h=6,p=5,g=2,n=7,c=8", "chunked", ["forward", "forward_backward"]),
}  # fmt: skip
operations = pytest.mark.parametrize("name", TINY)


def module(name):
    return importlib.import_module(f"orogen.bench.{name}")


def run(name, **changes):
    shape, implementation, _ = TINY[name]
    chosen = changes.pop("operation", module(name).OPERATION)
    settings = {
        "shapes": [shape],
        "implementations": [implementation],
        "peer": None,
        "samples": 2,
        "seed": 3,
        **changes,
    }
    return bench(chosen, **settings, ceiling_sizes=CEILINGS)


@operations
def test_every_work_is_right_and_timed(name):
    facts = json.loads(json.dumps(run(name)))
    records = facts["records"]
    assert [record["work"] for record in records] == TINY[name][2]
    for record in records:
        assert record["correct"] and record["best_ms"] <= record["ms"] <= record["worst_ms"]
        assert record["errors"]["not_finite"] == 0
        assert all(0 < error < operation.TOLERANCE for key, error in record["errors"].items() if key != "not_finite")
    assert set(facts["ceilings"]) == {"matmul_tflops", "copy_tb_per_second"}


def indices(name, array, operands):
    """Indices of three parts of a result: the first, a middle one and the last."""
    if name == "grouped_matmul":
        sizes_e = operands.host_sizes_e
        found = range(len(sizes_e)) if array.ndim == 3 else (np.cumsum(sizes_e) - sizes_e)[sizes_e > 0]
    elif array.ndim == 1:
        found = range(len(array))
    else:
        found = [(row, slice(None), head) for row, head in np.ndindex(array.shape[0], array.shape[2])]
    return [found[0], found[len(found) // 2], found[-1]]


@pytest.mark.parametrize(("name", "chosen"), [(name, work) for name, tiny in TINY.items() for work in tiny[2]])
def test_a_wrong_part_of_a_result_is_not_timed(name, chosen):
    """Perturbs one group, one head of a sequence or one row at a time, in each array of a result."""
    right = module(name).OPERATION
    shape = read_shape(right, TINY[name][0])
    operands = right.draw(shape, 3)
    made = right.ours(shape, operands, TINY[name][1])
    result = made[chosen].start()
    arrays = result if isinstance(result, tuple) else (result,)
    for index, array in enumerate(arrays):
        for place in indices(name, array, operands):
            wrong = (*arrays[:index], array.at[place].set(2 * array[place] + 0.01), *arrays[index + 1 :])
            read = lambda _, wrong=wrong: wrong if isinstance(result, tuple) else wrong[0]  # noqa: E731
            spoiled = {**made, chosen: made[chosen]._replace(read=read)}
            (record,) = run(name, operation=right._replace(ours=lambda *_, spoiled=spoiled: spoiled))["records"]
            assert record["correct"] is False and "ms" not in record, (index, place)


@operations
def test_a_result_that_is_not_finite_is_not_timed(name):
    right = module(name).OPERATION

    def spoiled(shape, operands, implementation):
        made = right.ours(shape, operands, implementation)
        first = TINY[name][2][0]
        return {**made, first: made[first]._replace(read=lambda y: y.at[(0,) * y.ndim].set(jnp.nan))}

    (record,) = run(name, operation=right._replace(ours=spoiled))["records"]
    assert record["correct"] is False and record["errors"]["not_finite"] == 1


@operations
def test_operands_differ_from_seed_to_seed(name):
    op = module(name).OPERATION
    shape = read_shape(op, TINY[name][0])
    first, again, other = (op.draw(shape, seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).mean() > 0.9


def test_groups_are_uneven_and_as_many_are_empty_as_requested():
    shape = read_shape(grouped_matmul.OPERATION, "n=200,d=4,f=4,e=5,empty=2")
    sizes_e = grouped_matmul.draw(shape, 0).host_sizes_e
    assert sizes_e.sum() == 200 and (sizes_e == 0).sum() == 2 and len(set(sizes_e.tolist())) > 2


def test_milliseconds_per_call_by_hand(monkeypatch):
    """Each of four calls takes 3 ms to start, and the last result is ready 7 ms later."""
    now = 0.0

    def take(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    program = timing.Program(lambda: take(0.003), lambda _: take(0.007), lambda result: result, None)
    times = timing.time_in_turn({"one": program, "other": program}, samples=2, calls=4)
    assert set(times) == {"one", "other"}
    np.testing.assert_allclose(list(times.values()), np.full((2, 2), (4 * 3 + 7) / 4))


def test_ceilings_by_hand(monkeypatch):
    """A product of 2 · 1000³ FLOPs in 2 ms; 10⁶ numbers of two bytes, read and written, in 0.04 ms."""
    monkeypatch.setattr(timing, "compiled", lambda *_: None)
    monkeypatch.setattr(timing, "time_in_turn", lambda *_, **__: {"product": [9.0, 2.0, 1.0], "copy": [0.04]})
    found = timing.ceilings(samples=1, sizes={"matrix": 1000, "copied": 10**6})
    assert found == {"matmul_tflops": 1.0, "copy_tb_per_second": 0.1}


def test_works_by_hand():
    # 2 · 6 · 5 · 3 FLOPs; rows 6x5 and outputs 6x3 in two bytes, weights 5x3 of one group of two
    product = grouped_matmul.works({"n": 6, "d": 5, "f": 3, "e": 2, "empty": 1})
    assert product["forward"] == product["gradient_rows"] == (180, 2 * (30 + 18 + 15))
    assert product["gradient_weights"] == (180, 2 * (30 + 18 + 30))
    # documents of 3 and 1 have 9/2 + 1/2 pairs: 4 · 5 · 2 · 7 · 5; q, y of 2 heads and k, v of one, 4 tokens of 7
    shape = {"b": 5, "t": 4, "h": 2, "g": 1, "k": 7, "documents": "3+1"}
    assert attention.works(shape)["forward"] == (4 * 5 * 2 * 7 * 5, 2 * 5 * 4 * 7 * 6)
    assert attention.works(shape)["forward_backward"] == (3.5 * 1400, 2 * 5 * 4 * 7 * 14)
    # per token: C·B 2 · 2 · 3 · 4 and x 2 · 6 · 5 · 4 in half a chunk of 8, states 4 · 6 · 5 · 3
    shape = {"b": 1, "t": 16, "h": 6, "p": 5, "g": 2, "n": 3, "c": 8}
    assert ssd.works(shape)["forward"].flops == 16 * (48 + 240 + 360)
    # x and y 30, dt 6 (four bytes), B and C 6 each
    assert ssd.works(shape)["forward"].bytes == 16 * (2 * 30 + 4 * 6 + 2 * 12 + 2 * 30)


def test_documents_fill_the_sequence():
    length = lambda text: attention.lengths({"t": 12, "documents": text})  # noqa: E731
    assert length("1") == [12] and length("3") == [4, 4, 4] and length("11+1") == [11, 1]
    for wrong in ("5", "0", "7+4", "12+0", "x", "3+", ""):
        with pytest.raises(ConfigError, match=r"expected a divisor of t=12, or lengths such as 11\+1 with sum 12"):
            length(wrong)


def test_shapes_are_read_or_refused():
    op = grouped_matmul.OPERATION
    assert read_shape(op, "r1_up") == grouped_matmul.SHAPES["r1_up"]
    assert read_shape(op, "n=7,e=3") == {**grouped_matmul.SHAPES["nano"], "n": 7, "e": 3}
    assert read_shape(op, "empty=0")["empty"] == 0
    for wrong in ("nan", "n=0", "n=-1", "n=1.5", "q=3", "n", "n=", "n=7,"):
        with pytest.raises(ConfigError, match=r"--shape '.*'; expected one of nano, r1_up"):
            read_shape(op, wrong)


@pytest.mark.parametrize("empty", [5, 7])
def test_some_group_must_have_rows(empty):
    with pytest.raises(ConfigError, match=f"empty={empty}; expected 0 or more, and fewer than e=5"):
        run("grouped_matmul", shapes=["n=8,d=4,f=4,e=5,empty=0", f"n=8,d=4,f=4,e=5,empty={empty}"])


def test_sizes_are_refused_before_any_is_timed(monkeypatch):
    monkeypatch.setattr(operation, "time_in_turn", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(ConfigError, match="documents=5; expected a divisor"):
        run("attention", shapes=[TINY["attention"][0], "t=24,documents=5"])


def test_ceilings_off_a_gpu_use_small_arrays(monkeypatch):
    sizes = []
    monkeypatch.setattr(timing, "compiled", lambda function, *arrays: sizes.extend(a.size for a in arrays))
    monkeypatch.setattr(timing, "time_in_turn", lambda programs, samples: dict.fromkeys(programs, [1.0]))
    timing.ceilings(samples=1)
    assert max(sizes) <= 2**22


def test_refusals_of_the_command(refused, monkeypatch, tmp_path):
    uneven = "b=1,t=16,h=6,p=4,g=4,n=4,c=8"
    assert refused("bench", "ssd", "--shape", uneven) == (
        f"chunked at {uneven}: 6 heads over 4 groups: expected a multiple"
    )
    line = refused("bench", "ssd", "--implementations", "magic")
    assert line == "implementation 'magic'; expected some of chunked, recurrence, triton, triton_interpreted"
    assert "expected a whole number from 0" in refused("bench", "ssd", "--seed", "-1")
    missing = tmp_path / "nowhere" / "picture.png"
    assert "expected a file in an existing folder" in refused("bench", "ssd", "--roofline", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused("bench", "ssd", "--peer", "torch") == (
        "--peer torch: torch not installed; expected the extra `peer` (orogen[peer])"
    )


@pytest.mark.parametrize(
    ("name", "option", "owners"),
    [
        ("ssd", ["--model", "r2"], "train, precision"),
        ("ssd", ["--whole_step"], "train"),
        ("attention", ["--turns", "2"], "train"),
        ("grouped_matmul", ["--models", "dense"], "cpu_train"),
        ("train", ["--shape", "nano"], ", ".join(command.OPERATIONS)),
        ("cpu_train", ["--profile", "D"], ", ".join(command.OPERATIONS) + ", train"),
        ("cpu_train", ["--gin_bindings", "A.b=1"], "train"),
    ],
)
def test_options_of_other_benchmarks_are_refused(refused, name, option, owners):
    assert refused("bench", name, *option) == f"{option[0]} with {name}; expected it with {owners} only"


def test_no_implementation_is_refused(refused):
    assert refused("bench", "ssd", "--implementations", "").startswith("implementation ''; expected some of chunked")


def test_every_option_has_a_place_and_a_default():
    parser = argparse.ArgumentParser()
    command.BENCH.add_arguments(parser)
    shared = {"help", "name", "peer", "steps"}
    assert {a.dest for a in parser._actions} - shared == {o for own in command.DEFAULTS.values() for o in own}
    assert set(vars(parser.parse_args(["ssd"]))) == shared - {"help"}
    options = command._complete(parser.parse_args(["ssd", "--shape", "a", "--shape", "b"]))
    assert (options.shape, options.implementations, options.roofline) == (["a", "b"], "chunked", None)


@pytest.mark.parametrize("file", ["picture.xyz", "picture", "folder.png", "nowhere/picture.png"])
def test_a_picture_that_cannot_be_drawn_is_refused_at_once(refused, monkeypatch, tmp_path, file):
    monkeypatch.setattr(operation, "bench", lambda *_, **__: pytest.fail("timed"))
    (tmp_path / "folder.png").mkdir()
    line = refused("bench", "ssd", "--roofline", tmp_path / file)
    assert line.startswith(
        f"--roofline {str(tmp_path / file)!r}; expected a file in an existing folder, with a suffix "
    )


@pytest.mark.parametrize("name", ["ssd", "train"])
@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_trace_that_cannot_be_written_is_refused_at_once(refused, monkeypatch, tmp_path, name, folder):
    monkeypatch.setattr(operation, "bench", lambda *_, **__: pytest.fail("timed"))
    (tmp_path / "file").write_text("")
    line = refused("bench", name, "--profile", tmp_path / folder)
    assert line == f"--profile {str(tmp_path / folder)!r}; expected a folder, existing or new"


def test_what_the_worker_process_refuses_is_refused(refused, monkeypatch):
    monkeypatch.setattr(train_peer, "require_peer", lambda name: None)
    line = refused("bench", "train", "--peer", "torch")
    assert line.startswith("train runs on a GPU of compute capability 9.0 (Hopper), found cpu; expected other choices")


def test_a_missing_peer_is_one_record_with_the_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def peer(shape, operands, implementation):
        raise operation.MissingError("no\nkernel")

    facts = run("ssd", peer="torch", operation=ssd.OPERATION._replace(peer=peer))
    (record,) = [record for record in facts["records"] if "missing" in record]
    assert record["implementation"] == "torch mamba_ssm" and record["missing"] == "no kernel"
    assert [r["work"] for r in facts["records"] if "work" in r] == TINY["ssd"][2]


def test_relative_error_by_hand():
    assert relative_error([3.0, 4.0], [3.0, 0.0]) == pytest.approx(4 / 3)
    assert relative_error([0.0], [0.0]) == 0 and relative_error([1.0], [0.0]) == float("inf")
    assert not relative_error([float("nan")], [1.0]) <= operation.TOLERANCE


def test_the_roofline_is_drawn(tmp_path):
    facts = run("grouped_matmul", implementations=["blocks", "reference"])
    facts["ceilings"] = {"matmul_tflops": 0.5, "copy_tb_per_second": 0.01}
    draw_roofline(facts, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "peer"), [("grouped_matmul", "torch grouped_mm"), ("attention", "torch flash_attention")]
)
def test_the_peer_computes_the_same(name, peer):
    shape = {"grouped_matmul": "n=64,d=16,f=16,e=4,empty=1", "attention": "b=2,t=24,h=4,g=2,k=8,documents=1"}[name]
    records = run(name, shapes=[shape], peer="torch")["records"]
    found = [record for record in records if record["implementation"] == peer]
    assert [record["work"] for record in found] == TINY[name][2]
