"""What a pipeline's loop needs to know of programs: which residuals depend on what, and which branch a tick takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from orogen.parallel.dependence import BATCH, BOTH, PARAMETERS, dependence
from orogen.parallel.pipeline import branches_ts
from orogen.parallel.schedule import BACKWARD, FORWARD, IDLE, make_schedule

FLAGS = [PARAMETERS, BATCH, BOTH]
W, TOKENS, X = jnp.ones((3, 3)), jnp.ones((4, 3)), jnp.ones((4, 3))


def found(function) -> list[int]:
    return dependence(jax.make_jaxpr(function)(W, TOKENS, X).jaxpr, FLAGS)


def test_outputs_have_the_flags_of_what_they_are_made_of():
    assert found(lambda w, t, x: (w.T, t > 0, t @ w, x + 1, jnp.zeros(2))) == [PARAMETERS, BATCH, BOTH, BOTH, 0]


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_calls_are_seen_through(wrap):
    assert found(lambda w, t, x: wrap(lambda w, t: (w * 2, t + 1))(w, t)) == [PARAMETERS, BATCH]


def test_loops_are_seen_through():
    """What is carried depends on what any turn adds to it; slices that a loop gives on stay what they are."""

    def loop(w, t, x):
        def body(carry, row):
            moved, grown = carry
            return (grown, grown * 2 + row), (row * 3, moved)

        carry, stacks = lax.scan(body, (jnp.zeros(3), jnp.zeros(3)), w)
        return *carry, *stacks

    assert found(loop) == [PARAMETERS] * 4

    def mixed(w, t, x):
        return lax.scan(lambda carry, row: (carry + row @ w, (row, carry)), jnp.zeros(3), t)

    assert [int(flags) for flags in found(lambda w, t, x: jax.tree.leaves(mixed(w, t, x)))] == [BOTH, BATCH, BOTH]


def test_a_loop_without_constants_and_one_of_matrices_are_told_apart():
    def loop(w, t, x):
        return lax.scan(lambda carry, _: (carry, w), t, None, length=2)

    assert found(lambda w, t, x: jax.tree.leaves(loop(w, t, x))) == [BATCH, PARAMETERS]


@pytest.mark.parametrize(("stages", "microbatches", "virtual"), [(2, 3, 1), (4, 4, 2)])
def test_branches_are_those_of_the_chunks_programs(stages, microbatches, virtual):
    kind = "1f1b" if virtual == 1 else "interleaved"
    schedule = make_schedule(kind, stages=stages, microbatches=microbatches, virtual=virtual)
    program_vp = np.arange(stages * virtual).reshape(virtual, stages) % 3
    branch_ts = branches_ts(schedule.tables, program_vp, 3)
    for t, s in np.ndindex(branch_ts.shape):
        operation, chunk = schedule.tables.operation[t, s], schedule.tables.chunk[t, s]
        expected = {IDLE: 0, FORWARD: 1 + program_vp[chunk, s], BACKWARD: 4 + program_vp[chunk, s]}
        assert branch_ts[t, s] == expected[operation]


@pytest.mark.parametrize(("stages", "microbatches", "virtual"), [(2, 1, 1), (4, 6, 1), (2, 4, 2), (4, 4, 4)])
def test_forward_passes_alone_are_all_there_and_stash_nothing(stages, microbatches, virtual):
    kind = "1f1b" if virtual == 1 else "interleaved"
    schedule = make_schedule(kind, stages=stages, microbatches=microbatches, virtual=virtual).forward_only()
    operation_ts, microbatch_ts, chunk_ts = schedule.tables[:3]
    for stage in range(stages):
        ran = operation_ts[:, stage] == FORWARD
        passes = set(zip(microbatch_ts[ran, stage], chunk_ts[ran, stage], strict=True))
        assert passes == {(m, c) for m in range(microbatches) for c in range(virtual)}
    assert not np.any(operation_ts == BACKWARD)
    assert max(schedule.stash_slots) == 0 and np.all(schedule.tables.stash == 0)
    assert schedule.ticks == microbatches * virtual + stages - 1
