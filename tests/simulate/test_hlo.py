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


STARTED = """
%turn (p: f32[2]) -> f32[2] {
  %x = f32[4]{0} all-to-all(%p), replica_groups={{0,1},{2,3},{4,5}}, dimensions={0}
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %w = f32[2] while(%p), condition=%cond, body=%turn
  %a = ((f32[2,6]{1,0}, bf16[2]{0}), (f32[4,6]{1,0}, /*index=1*/bf16[4]{0})) all-gather-start(%x, %y), replica_groups={{0,1},{2,3},{4,5}}
  %b = (f32[4,6]{1,0}, bf16[4]{0}) all-gather-done(%a)
  %c = ((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%z), replica_groups={{0,1},{2,3},{4,5}}, to_apply=%sum
  %d = ((f32[7]{0}), f32[7]{0}) all-reduce-start(%z), replica_groups={{0,1},{2,3},{4,5}}, to_apply=%sum
  %e = (f32[5]{0}, f32[3]{0}) all-reduce-start(%z, %y), replica_groups={{0,2,4},{1,3,5}}, to_apply=%sum
  %f = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,2},{2,4},{4,0}}
}
"""  # noqa: E501 - one instruction is one line


def test_what_starts_a_collective_gives_its_operands_too():
    """As XLA:GPU writes them, over a mesh of 3 x 2; the loop's length depends on data."""
    with pytest.raises(ValueError, match="unknown trip count"):
        hlo_collectives(STARTED, {"a": 3, "b": 2})
    found = hlo_collectives(STARTED, {"a": 3, "b": 2}, unbounded=0)
    assert found == {
        ("all-gather", ("b",)): (2, (96 + 8) / 2),
        ("reduce-scatter", ("b",)): (1, 32 / 2),
        ("all-reduce", ("b",)): (1, 2 * 28 / 2),
        ("all-reduce", ("a",)): (2, 2 * 32 * 2 / 3),
        ("collective-permute", ("a",)): (1, 20),
    }
    twice = hlo_collectives(STARTED, {"a": 3, "b": 2}, unbounded=2)
    assert twice[("all-to-all", ("b",))] == (2, 2 * 16 / 2)
