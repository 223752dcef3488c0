"""Buffers of the ragged dispatch: rows without room are counted, and those with room arrive.

Letters: b batch, t time.
"""

import math

import numpy as np
import pytest
from tests.moe.meshes import (
    BIASES,
    LENGTH,
    MESHES,
    ROWS,
    assert_equal,
    config,
    inputs,
    layer_result,
    reference_result,
    weights,
)

from orogen.config.plan import PlanConfig


# What a capacity drops is settled before rows are sent: both on meshes with and without expert_tensor, then one each.
@pytest.mark.parametrize(
    ("capacity_factor", "mesh"),
    [
        (None, "4both"), (1.5, "4both"), (None, "8shared"), (1.5, "8shared"), (1.5, "8wide"), (None, "4cut"),
        (1.5, "4sliced"),
    ],
)  # fmt: skip
def test_rows_without_room_are_counted_and_those_with_room_arrive(capacity_factor, mesh):
    """Every token goes to experts 1, 5 and 6, so to the ranks that hold them; half an even share of room."""
    model, length = config(), 2 * LENGTH
    given, data = weights(model, 17, bias=BIASES["three full"]), inputs(model, 18, rows=ROWS, length=length)
    plan = PlanConfig(
        **MESHES[mesh], dispatch="ragged", buffer_factor=0.5, capacity_factor=capacity_factor
    )  # drops first
    expected = reference_result(model, given, data, sources=(1, 1), capacity=None)
    np.testing.assert_array_equal(np.nonzero(expected.load_e)[0], [1, 5, 6])
    tokens = ROWS * length // plan.devices
    valid_bt = np.asarray(data.segments_bt != 0)
    kept_bt = valid_bt if capacity_factor is None else first(valid_bt, plan, math.ceil(tokens * 3 / 8 * 1.5))
    lost = without_room(kept_bt, plan, math.ceil(tokens * 3 / 2))
    assert lost
    found = layer_result(model, plan, given, data)
    assert found.overflow == len(lost)
    assert found.dropped == 3 * (valid_bt & ~kept_bt).sum()
    np.testing.assert_array_equal(found.load_e, expected.load_e)
    whole_bt = kept_bt.copy()
    whole_bt.reshape(-1)[[token for token, _ in lost]] = False
    assert whole_bt.any()
    error_bt = np.abs(found.y_btd - expected.y_btd).max(-1)
    np.testing.assert_array_equal(error_bt > 1e-5 * np.abs(expected.y_btd).max(), valid_bt & ~whole_bt)


def pieces(plan: PlanConfig, x_bt: np.ndarray) -> list[np.ndarray]:
    """The part of `x_bt` that each rank holds."""
    return [piece for rows in np.split(x_bt, plan.data) for piece in np.split(rows, plan.tensor, 1)]


def first(valid_bt: np.ndarray, plan: PlanConfig, capacity: int) -> np.ndarray:
    """The first `capacity` valid tokens of each rank."""
    kept_bt = valid_bt.copy()
    for piece in pieces(plan, kept_bt):
        piece &= np.cumsum(piece).reshape(piece.shape) <= capacity
    return kept_bt


def without_room(valid_bt: np.ndarray, plan: PlanConfig, room: int) -> list[tuple[int, int]]:
    """The assignments (token, expert) that come to a full buffer, where every token wants experts 1, 5 and 6: by loops
    over groups of expert ranks, receivers, senders, the receiver's experts and the sender's tokens."""
    token_bt = np.arange(valid_bt.size).reshape(valid_bt.shape)
    tokens = [t[valid] for t, valid in zip(pieces(plan, token_bt), pieces(plan, valid_bt), strict=True)]
    devices = np.arange(plan.devices).reshape(-1, plan.expert, plan.expert_tensor)
    lost = []
    for senders in devices.swapaxes(1, 2).reshape(-1, plan.expert):
        for held in np.split(np.arange(8), plan.expert):
            queue = [
                (token, expert) for sender in senders for expert in (1, 5, 6) if expert in held
                for token in tokens[sender].tolist()
            ]  # fmt: skip
            lost += queue[room:]
    return lost


@pytest.mark.parametrize("mesh", ["4both", "8shared"])
def test_buffers_with_room_lose_nothing(mesh):
    model = config()
    given, data = weights(model, 17, bias=BIASES["three full"]), inputs(model, 18, rows=ROWS, length=2 * LENGTH)
    expected = reference_result(model, given, data, sources=(1, 1), capacity=None)
    for factor in (8.0, None):
        found = layer_result(model, PlanConfig(**MESHES[mesh], dispatch="ragged", buffer_factor=factor), given, data)
        assert found.overflow == 0
        assert_equal(found, expected)
