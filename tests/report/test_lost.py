"""What a run lost: by kills, and by going back past bad steps."""

import pytest

from orogen.config.checks import ConfigError
from orogen.report.lost import Lost, add_lost, jumps, read_lost
from orogen.report.metrics import MetricsWriter


def write_steps(run_dir, last):
    with MetricsWriter(run_dir, resume_step=0) as writer:
        for step in range(1, last + 1):
            more = {"compile_seconds": 7.0} if step == 1 else {"evaluate_seconds": 0.25} if step == 5 else {}
            writer.write({"step": step, "step_ms": 100.0 * step, **more})


def test_a_loss_counts_the_steps_after_the_checkpoint_and_what_was_done_between_them(tmp_path):
    write_steps(tmp_path, 6)
    loss = add_lost(tmp_path, 3, "end")
    assert loss == Lost(3, 6, pytest.approx(0.4 + 0.5 + 0.25 + 0.6), "end")
    assert add_lost(tmp_path, 0, "end").seconds == pytest.approx(2.1 + 7 + 0.25)
    assert [loss.to for loss in read_lost(tmp_path)] == [3, 0]


def test_nothing_lost_leaves_no_file(tmp_path):
    assert add_lost(tmp_path, 0, "end") is None
    write_steps(tmp_path, 6)
    assert add_lost(tmp_path, 6, "end") is None
    assert not (tmp_path / "lost.jsonl").exists() and read_lost(tmp_path) == []


def test_a_loss_is_counted_once_if_a_kill_falls_before_its_lines_are_removed(tmp_path):
    write_steps(tmp_path, 6)
    place = {"position": {"epoch": 1}}
    first = add_lost(tmp_path, 4, "roll_back", place)
    assert add_lost(tmp_path, 4, "end") == first == Lost(4, 6, pytest.approx(1.35), "roll_back", place)
    assert len(read_lost(tmp_path)) == 1


def test_a_roll_back_counts_though_the_disk_refused_the_lines_of_its_steps(tmp_path):
    """Without it the run would go on with the batches that it goes back from."""
    write_steps(tmp_path, 4)
    place = {"position": {"epoch": 1}}
    assert add_lost(tmp_path, 4, "roll_back", place, until=6) == Lost(4, 6, 0, "roll_back", place)
    assert add_lost(tmp_path, 4, "roll_back", {"position": 2}, until=6) == Lost(4, 6, 0, "roll_back", {"position": 2})
    assert add_lost(tmp_path, 4, "end") is None
    write_steps(tmp_path, 5)
    assert add_lost(tmp_path, 4, "roll_back", place, until=6) == Lost(4, 6, pytest.approx(0.75), "roll_back", place)
    assert add_lost(tmp_path, 4, "end").cause == "roll_back"  # a kill before its lines were removed
    assert [loss.cause for loss in read_lost(tmp_path)] == ["roll_back"] * 3


def test_jumps_are_those_of_the_steps_that_were_kept():
    a, b, c = {"at": 9}, {"at": 15}, {"at": 30}
    back = lambda to, position: Lost(to, to + 5, 1.0, "roll_back", position)  # noqa: E731
    assert jumps([]) == {}
    assert jumps([back(4, a), back(4, b), back(12, c)]) == {4: b, 12: c}
    assert jumps([back(4, a), Lost(4, 7, 1.0, "end"), Lost(4, 8, 1.0, "repeat")]) == {4: a}
    assert jumps([back(4, a), back(12, c), Lost(8, 14, 1.0, "end")]) == {4: a}
    assert jumps([back(4, a), Lost(0, 4, 1.0, "end")]) == {}


@pytest.mark.parametrize("text", ["x\n", "[1]\n", '{"to": 1}\n', '{"to": 1, "until": 2, "seconds": 1, "why": 3}\n'])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "lost.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"lost.jsonl is damaged; expected one object with to, until, seconds"):
        read_lost(tmp_path)
