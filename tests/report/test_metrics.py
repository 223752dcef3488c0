"""What a run writes as it goes: metrics.jsonl and how it resumes, TensorBoard events, the progress line."""

import errno
import io
import json
import math
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from orogen.config.checks import ConfigError
from orogen.report.metrics import MetricsWriter, Progress, read_metrics


def step_metrics(step: int) -> dict[str, object]:
    """Three experts in two layers, and numbers whose decimal form is long."""
    load = [[step, 2, 3], [4, 5, 6]]
    return {"step": step, "loss": 10 / (step + 2), "tokens": 64, "expert_load": load, "dropped_tokens": 1}


def run(run_dir: pathlib.Path, steps: range, *, resume_step: int | None = None) -> bytes:
    with MetricsWriter(run_dir, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step_metrics(step))
    return (run_dir / "metrics.jsonl").read_bytes()


def test_what_is_written_is_read_back(tmp_path):
    run(tmp_path, range(1, 4))
    assert read_metrics(tmp_path) == [step_metrics(step) for step in range(1, 4)]


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(step_metrics(1))
        assert read_metrics(tmp_path) == [step_metrics(1)]


def test_arrays_become_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": np.int32(1), "loss": np.float32(0.1), "expert_load": np.arange(6).reshape(2, 3)})
    line = {"step": 1, "loss": float(np.float32(0.1)), "expert_load": [[0, 1, 2], [3, 4, 5]]}
    assert read_metrics(tmp_path) == [line]


@pytest.mark.parametrize("killed_at", [5, 6, 9])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, killed_at):
    whole = run(tmp_path / "whole", range(1, 13))
    run(tmp_path / "killed", range(1, killed_at + 1))
    assert run(tmp_path / "killed", range(6, 13), resume_step=5) == whole


@pytest.mark.parametrize("bytes_left", [1, 20, -2])
def test_a_line_torn_by_a_kill_is_removed(tmp_path, bytes_left):
    """The line of step 7 is cut after its first bytes, or just before its closing brace."""
    whole = run(tmp_path / "whole", range(1, 10))
    run(tmp_path / "killed", range(1, 7))
    torn = whole.splitlines(keepends=True)[6][:bytes_left]
    with (tmp_path / "killed" / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [r["step"] for r in read_metrics(tmp_path / "killed")] == list(range(1, 7))
    assert run(tmp_path / "killed", range(7, 10), resume_step=6) == whole


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    whole = run(tmp_path / "whole", range(1, 8))
    content = run(tmp_path / "killed", range(1, 6))
    (tmp_path / "killed" / "metrics.jsonl").write_bytes(content[:-1])
    assert run(tmp_path / "killed", range(6, 8), resume_step=5) == whole


@pytest.mark.parametrize("line", ["[1]", "7", "null", '{"loss": 1}', '{"step": "1"}', '{"step": true}'])
def test_a_line_without_a_step_is_refused(tmp_path, line):
    run(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 3 is .*; expected a JSON object with a whole `step`"):
        MetricsWriter(tmp_path, resume_step=2)
    with pytest.raises(ConfigError, match="line 3"):
        read_metrics(tmp_path)


def test_a_killed_process_loses_no_step_it_wrote(tmp_path):
    script = (
        "import os, signal, sys; from orogen.report.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\n"
        "for step in range(1, 6): writer.write({'step': step, 'loss': 1 / step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -9
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_resuming_before_the_first_line_starts_afresh(tmp_path):
    run(tmp_path, range(1, 4))
    assert run(tmp_path, range(1, 3), resume_step=0) == run(tmp_path / "whole", range(1, 3))


def test_resuming_without_a_file_is_allowed(tmp_path):
    assert run(tmp_path / "new", range(4, 6), resume_step=3)


def test_a_broken_line_in_the_middle_is_an_error_and_changes_nothing(tmp_path):
    lines = run(tmp_path, range(1, 5)).splitlines(keepends=True)
    broken = b"".join([lines[0], lines[1][:9] + b"\n", *lines[2:]])
    (tmp_path / "metrics.jsonl").write_bytes(broken)
    for read in (lambda: read_metrics(tmp_path), lambda: MetricsWriter(tmp_path, resume_step=4)):
        with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2 is .* expected a JSON object"):
            read()
    assert (tmp_path / "metrics.jsonl").read_bytes() == broken


def test_a_fresh_writer_refuses_a_used_folder(tmp_path):
    content = run(tmp_path, range(1, 3))
    with pytest.raises(FileExistsError, match="has metrics already; expected none, or a resume_step"):
        MetricsWriter(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


@pytest.mark.parametrize("step", [2, 1, None, 2.5])
def test_a_step_that_does_not_advance_is_refused(tmp_path, step):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 2})
        with pytest.raises(ValueError, match="expected an integer above 2"):
            writer.write({"step": step})


def test_a_resumed_writer_refuses_a_step_it_kept(tmp_path):
    run(tmp_path, range(1, 6))
    with (
        MetricsWriter(tmp_path, resume_step=4) as writer,
        pytest.raises(ValueError, match="step is 4, expected an integer above 4"),
    ):
        writer.write(step_metrics(4))


def test_nonfinite_numbers_are_valid_json_and_survive(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "loss": math.nan, "grad_norm": np.float32("inf"), "by_layer": [[1.0, -math.inf]]})
        writer.write({"step": 2, "loss": 3.0})
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    line = json.loads(first, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["loss"] is line["grad_norm"] is line["by_layer"][0][1] is None
    assert line["nonfinite"] == [["loss", "nan"], ["grad_norm", "inf"], ["by_layer", 0, 1, "-inf"]]
    assert "nonfinite" not in json.loads(second)
    read = read_metrics(tmp_path)[0]
    assert math.isnan(read["loss"]) and read["grad_norm"] == math.inf and read["by_layer"] == [[1.0, -math.inf]]
    assert "nonfinite" not in read


def test_the_reserved_key_is_refused(tmp_path):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="'nonfinite', which is reserved"):
        writer.write({"step": 1, "nonfinite": 3})


def events(run_dir: pathlib.Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of every scalar. A TFRecord is 8 bytes of length, 4 of checksum, the event, 4 of checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((run_dir / "tensorboard").iterdir(), key=lambda path: path.suffix):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            content = content[16 + size :]
    return found


def test_tensorboard_gets_scalars_and_each_layers_imbalance(tmp_path):
    run(tmp_path, range(1, 3))
    found = events(tmp_path)
    assert (2, "loss", 2.5) in found and (2, "dropped_tokens", 1) in found
    layers = {tag: value for step, tag, value in found if step == 1 and tag.startswith("expert_load")}
    assert layers == {
        "expert_load_max_over_even/000": pytest.approx(3 * 3 / 6),
        "expert_load_max_over_even/001": pytest.approx(6 * 3 / 15),
    }


def test_tensorboard_gets_each_number_of_a_list_and_nothing_else(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "mtp_loss": [2.5, 3.5], "note": "words", "heldout_loss": None, "nested": [[1]]})
    assert events(tmp_path) == [(1, "mtp_loss/0", 2.5), (1, "mtp_loss/1", 3.5)]


def test_a_resume_within_the_second_keeps_earlier_events(tmp_path):
    run(tmp_path, range(1, 4))
    run(tmp_path, range(4, 6), resume_step=3)
    assert [step for step, tag, _ in events(tmp_path) if tag == "loss"] == [1, 2, 3, 4, 5]


class Clock:
    """A clock that a test moves by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_come_at_intervals_and_at_the_end():
    stream, clock = io.StringIO(), Clock()
    with Progress(9, every_seconds=10, stream=stream, clock=clock) as progress:
        for step in range(1, 10):
            clock.now = 4.0 * step
            progress.update(step, {"loss": 2.0, "tokens_per_second": 12345.6, "mfu": 0.314})
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/9", "4/9", "7/9", "9/9"]
    assert lines[1] == "step 4/9  loss 2.0000  12,346 tokens/s  MFU 31.4%  0:00:20 left"
    assert lines[0].endswith("-:--:-- left")


def test_a_held_out_score_is_always_printed():
    stream = io.StringIO()
    with Progress(9, every_seconds=1e9, stream=stream) as progress:
        progress.update(1, {"loss": 2.0})
        progress.update(2, {"loss": 2.0, "heldout_loss": 2.5, "heldout_bits_per_byte": 1.25})
        progress.update(3, {"loss": 2.0, "heldout_loss": None})
    assert len(stream.getvalue().splitlines()) == 2
    assert "held-out loss 2.5000  held-out 1.2500 bits/byte" in stream.getvalue()


def test_time_left_of_a_resumed_run_counts_only_its_own_steps():
    stream, clock = io.StringIO(), Clock()
    with Progress(1000, first_step=900, every_seconds=0, stream=stream, clock=clock) as progress:
        progress.update(901, {})
        clock.now = 2.0
        progress.update(902, {})
    assert stream.getvalue().splitlines()[-1].endswith("0:03:16 left")


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_stdout_stays_clean(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Progress(4, stream=stream) as progress:
        progress.update(2, {"loss": 2.0, "heldout_bits_per_byte": 1.25})
        print('{"answer": 1}')
        progress.update(4, {"loss": 1.5})
    shown = stream.getvalue()
    assert "━" in shown and "4/4" in shown and "loss 1.5000" in shown
    assert "step 2  held-out 1.2500 bits/byte" in shown
    assert capsys.readouterr().out == '{"answer": 1}\n'


def test_progress_goes_to_stderr(capsys):
    with Progress(2) as progress:
        progress.update(1, {"loss": 2.0})
    captured = capsys.readouterr()
    assert captured.out == "" and "step 1/2  loss 2.0000" in captured.err


def test_a_record_whose_line_the_disk_refuses_is_not_amended(tmp_path, monkeypatch):
    """The last line of the file is that of another step."""

    def refuse(content):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = MetricsWriter(tmp_path, loggers=())
    writer.write({"step": 1, "loss": 1.0})
    disk = writer._file._file
    writer._file._file = SimpleNamespace(write=refuse, close=disk.close)
    writer.write({"step": 2, "loss": 2.0})
    with pytest.raises(OSError, match="No space left on device"):
        writer.amend({"save_seconds": 3.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}] and writer.last == {"step": 2, "loss": 2.0}
    writer._file._file = disk
    writer.amend({"save_seconds": 3.0})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0, "save_seconds": 3.0}]
