"""Collectives of compiled programs, read by hand."""

import pytest

from orogen.simulate.hlo import hlo_collectives

PROGRAM = """
%turn (p: f32[2]) -> f32[2] {
  %all-gather.1 = f32[4,6]{1,0} all-gather(%x), replica_groups=%GROUPS%, dimensions={0}
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %w = f32[2] while(%p), condition=%cond, body=%turn, backend_config={"known_trip_count":{"n":"3"}}
  %collective-permute.2 = f32[5]{0} collective-permute(%y), source_target_pairs={{0,2},{2,4},{4,0},{1,3},{3,5},{5,1}}
}
"""


@pytest.mark.parametrize(
    ("groups", "axes", "bytes_sent"),
    [
        ("{{0,1},{2,3},{4,5}}", ("b",), 3 * 48),
        ("[2,3]<=[3,2]T(1,0)", ("a",), 3 * 64),
        ("mesh['axis_0'=3,'axis_1'=2] {'axis_0'}", ("a",), 3 * 64),
        ("mesh['axis_0'=6] {'axis_0':(3)2}", ("b",), 3 * 48),
        ("mesh['axis_0'=2,'axis_1'=3], device_ids=([3,2]T(1,0)) {'axis_1'}", ("a",), 3 * 64),
        ("mesh['axis_0'=2,'axis_1'=3], device_ids=(0,2,4,1,3,5) {'axis_0'}", ("b",), 3 * 48),
        ("{}", ("a", "b"), 3 * 80),
    ],
)
def test_programs_are_read_by_hand(groups, axes, bytes_sent):
    """96 bytes gathered in a loop of three, over a mesh of 3 x 2; and a ring of three with 20 bytes."""
    table = hlo_collectives(PROGRAM.replace("%GROUPS%", groups), {"a": 3, "b": 2})
    assert table == {("all-gather", axes): (3, bytes_sent), ("collective-permute", ("a",)): (1, 20)}


def test_programs_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="unknown form"):
        hlo_collectives(PROGRAM.replace("%GROUPS%", "?"), {"a": 3, "b": 2})
    with pytest.raises(ValueError, match="no mesh axes"):
        hlo_collectives(PROGRAM.replace("%GROUPS%", "{{0,3},{1,2},{4,5}}"), {"a": 3, "b": 2})
    with pytest.raises(ValueError, match="unknown trip count"):
        text = PROGRAM.replace("%GROUPS%", "{}").replace("known_trip_count", "known")
        hlo_collectives(text, {"a": 3, "b": 2})
