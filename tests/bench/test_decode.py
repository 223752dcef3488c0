"""Benchmarks of decoding at tiny sizes: costs by hand, every layer checked before timing, states kept between calls."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orogen.bench import decode, few_rows, thin_matmul
from orogen.bench.layers import carried, draws
from orogen.bench.operation import TOLERANCE, bench, read_shape
from orogen.config.checks import ConfigError

CEILINGS = {"matrix": 16, "copied": 64}
TINY = {
    "state_update": "b=2,h=4,p=3,g=2,n=5,m=2,layers=2",
    "replay": "b=2,t=2,l=5,c=3,h=4,p=3,g=2,n=5,layers=2",
    "paged_attention": "b=2,t=2,h=4,g=2,k=8,c=9,s=4,layers=2",
    "few_rows": "b=3,k=2,d=7,f=5,e=4,layers=2",
    "thin_matmul": "b=3,d=7,f=6,n=5,h=4,layers=2",
}
MODULES = {module.OPERATION.name: module for module in decode.MODULES}
USUAL = {"state_update": "reference", "replay": "parallel", "paged_attention": "reference", "few_rows": "blocks",
         "thin_matmul": "reference"}  # fmt: skip
operations = pytest.mark.parametrize("name", TINY)


def run(name, operation=None):
    operation = operation or MODULES[name].OPERATION
    return bench(
        operation, shapes=[TINY[name]], implementations=[USUAL[name]], peer=None, samples=2, seed=3,
        ceiling_sizes=CEILINGS,
    )  # fmt: skip


@operations
def test_every_work_is_right_and_timed(name):
    facts = json.loads(json.dumps(run(name)))
    shape = read_shape(MODULES[name].OPERATION, TINY[name])
    works = MODULES[name].works(shape)
    assert [record["work"] for record in facts["records"]] == list(works)
    for record in facts["records"]:
        assert record["correct"] and record["errors"]["not_finite"] == 0
        assert all(error < TOLERANCE for error in record["errors"].values())
        megabytes = works[record["work"]].bytes / 1e6
        assert record["megabytes"] == pytest.approx(megabytes, rel=1e-3)
        floor = megabytes / 1e6 / facts["ceilings"]["copy_tb_per_second"] * 1e3
        assert record["memory_floor_ms"] == pytest.approx(floor, rel=1e-3)


@operations
def test_a_wrong_result_of_any_layer_is_not_timed(name):
    """Perturbs every array of every work, one at a time."""
    operation = MODULES[name].OPERATION
    shape = read_shape(operation, TINY[name])
    operands = operation.draw(shape, 3)
    results = {work: p.read(p.start()) for work, p in operation.ours(shape, operands, USUAL[name]).items()}
    assert max(operation.check(shape, operands, results).values()) <= TOLERANCE
    for work, result in results.items():
        leaves, tree = jax.tree.flatten(result)
        for number, leaf in enumerate(leaves):
            if leaf.dtype == jnp.int32:  # the cursors that `flush` returns
                continue
            wrong = [*leaves[:number], leaf + 1, *leaves[number + 1 :]]
            errors = operation.check(shape, operands, {**results, work: jax.tree.unflatten(tree, wrong)})
            assert max(errors.values()) > TOLERANCE, (work, number)
            if leaf.dtype == jnp.int8:  # no number of these is NaN, but their scales may be
                continue
            wrong[number] = leaf.at[(0,) * leaf.ndim].set(jnp.nan)
            errors = operation.check(shape, operands, {**results, work: jax.tree.unflatten(tree, wrong)})
            assert errors["not_finite"] == 1


@operations
def test_operands_differ_from_seed_to_seed_and_layer_to_layer(name):
    operation = MODULES[name].OPERATION
    shape = read_shape(operation, TINY[name])
    first, again, other = (jax.tree.leaves(operation.draw(shape, seed)) for seed in (1, 1, 2))
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, same)
    floats = [k for k, leaf in enumerate(first) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all((np.asarray(first[k]) != np.asarray(other[k])).mean() > 0.8 for k in floats)
    assert len({np.asarray(first[k].astype(jnp.float32)).tobytes() for k in floats}) == len(floats)


def test_costs_by_hand():
    works = {name: module.works(read_shape(module.OPERATION, TINY[name])) for name, module in MODULES.items()}
    # Per sequence and layer: 60 numbers of state; x and y 12, dt 4 (four bytes), B and C 10 each.
    assert works["state_update"]["ssm"] == (4 * 5 * 60, 4 * (60 * 8 + 2 * 24 + 4 * 4 + 2 * 20))
    assert works["state_update"]["ssm_float16"].bytes == 4 * (60 * 4 + 2 * 24 + 4 * 4 + 2 * 20)
    # A scale per head and channel.
    assert works["state_update"]["ssm_int8"].bytes == 4 * (60 * 2 + 4 * 3 * 8 + 2 * 24 + 4 * 4 + 2 * 20)
    # 12 channels of 2; x, y, dt, B and C, and once per layer A.
    assert works["state_update"]["selective"] == (4 * 5 * 24, 4 * (24 * 8 + 2 * 24 + 4 * 12 + 2 * 4) + 2 * 4 * 24)
    # A token of the ring is x, B and dt: 60 bytes. Three are read, two read and written; C and y are of two.
    assert works["replay"]["replay"].bytes == 4 * (60 * 4 + 3 * 60 + 2 * 2 * 60 + 2 * (2 * 10 + 2 * 12))
    assert works["replay"]["replay"].flops == 4 * (2 * 2 * 60 + 2 * (2 * 3 + 3) * (10 + 12))
    assert works["replay"]["flush"] == (4 * 3 * 3 * 60, 4 * (60 * 8 + 3 * 60))
    # 8 + 9 pairs of two heads' keys and values; q and y of two tokens.
    assert works["paged_attention"]["forward"] == (2 * 2 * 4 * 4 * 8 * 17, 2 * 2 * 2 * (2 * 9 * 16 + 2 * 2 * 32))
    used = sum((sizes > 0).sum() for sizes in few_rows.choices(read_shape(few_rows.OPERATION, TINY["few_rows"])))
    assert works["few_rows"]["up"] == works["few_rows"]["down"] == (2 * 2 * 6 * 35, 2 * (used * 35 + 2 * 6 * 12))
    # 26 columns of 7 rows; 3 inputs and outputs. In 8 bits, a scale of four bytes per column.
    assert works["thin_matmul"]["bfloat16"] == (2 * 2 * 3 * 7 * 26, 2 * (2 * 7 * 26 + 2 * 3 * (7 + 26)))
    assert works["thin_matmul"]["float8"] == (2 * 2 * 3 * 7 * 26, 2 * (7 * 26 + 4 * 26 + 2 * 3 * (7 + 26)))


def test_a_gpu_that_cannot_convert_e4m3_times_the_rest(monkeypatch):
    """Its kernel is refused there; interpreted, it is not."""
    monkeypatch.setattr(thin_matmul, "converts_e4m3", lambda: False)
    monkeypatch.setattr(thin_matmul, "compiled", lambda function, *arguments: arguments)
    shape = read_shape(thin_matmul.OPERATION, TINY["thin_matmul"])
    operands = thin_matmul.draw(shape, 0)
    assert list(thin_matmul.ours(shape, operands, "triton")) == ["bfloat16"]
    assert list(thin_matmul.ours(shape, operands, "triton_interpreted")) == ["bfloat16", "float8"]


def test_tokens_choose_different_experts():
    sizes = few_rows.choices({**few_rows.R1, "b": 5, "layers": 3})
    assert len(sizes) == 3 and all(s.sum() == 30 and s.max() <= 5 for s in sizes) and (sizes[0] != sizes[1]).any()


def test_a_state_is_carried_from_call_to_call():
    state = (jnp.arange(3.0),)
    program = carried(lambda state, step: (2 * state[0], (state[0] + step,)), state, jnp.float32(10))
    first = program.read(program.start())
    second = program.read(program.start())
    np.testing.assert_array_equal(first[0], [0, 2, 4])
    np.testing.assert_array_equal(first[1][0], [10, 11, 12])
    np.testing.assert_array_equal(second[0], [20, 22, 24])
    np.testing.assert_array_equal(state[0], [0, 1, 2])


def test_every_draw_differs():
    draw = draws(3)
    assert (draw(5) != draw(5)).all()


class TestAllAtOnce:
    """`orogen bench decode`."""

    def tiny(self):
        shape = lambda module, text: {"tiny": read_shape(module.OPERATION, text)}  # noqa: E731
        return [m.OPERATION._replace(shapes=shape(m, TINY[name])) for name, m in MODULES.items()]

    def run(self, **changes):
        settings = {"shapes": [], "implementations": ["reference", "parallel", "blocks"], "samples": 1, "seed": 0}
        return decode.bench(self.tiny(), **{**settings, **changes}, ceiling_sizes=CEILINGS)

    def test_has_the_records_of_all(self):
        facts = self.run()
        assert facts["bench"] == "decode" and {"device", "ceilings"} <= facts.keys()
        found = {(r["bench"], r["implementation"], r["work"]) for r in facts["records"]}
        assert {name for name, _, _ in found} == set(TINY)
        assert ("few_rows", "blocks", "up") in found and ("few_rows", "reference", "down") in found
        assert ("replay", "parallel", "flush") in found and ("thin_matmul", "reference", "float8") in found
        assert ("state_update", "reference", "selective") in found

    def test_names_that_no_operation_has_are_refused(self):
        with pytest.raises(ConfigError, match="implementation 'fast'; expected some of reference, triton"):
            self.run(implementations=["reference", "fast"])
        with pytest.raises(ConfigError, match="--shape 'b2'; expected some of tiny"):
            self.run(shapes=["b2"])
        with pytest.raises(ConfigError, match="no implementation of few_rows; expected some of"):
            self.run(implementations=["parallel", "triton"])

    def test_every_operation_has_the_three_batches(self):
        assert all({"b1", "b64", "b256"} <= o.shapes.keys() for o in decode.OPERATIONS)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("replay", "l=4,c=3,t=2", "l=4; expected at least c . t = 5 entries"),
        ("paged_attention", "t=3,c=2", "t=3; expected at most c=2"),
        ("few_rows", "k=9,e=8", "k=9; expected at most e=8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, text, line):
    module = MODULES[name]
    with pytest.raises(ConfigError, match=line):
        module.works(read_shape(module.OPERATION, text))


def test_peers_are_refused(refused):
    for name in ("decode", "replay"):
        assert refused("bench", name, "--peer", "torch") == (
            f"--peer torch with {name}; expected none, since it has no peer"
        )
