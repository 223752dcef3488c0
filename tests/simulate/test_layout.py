"""Memory as XLA lays it out, read from scripts that write a report where XLA_FLAGS say."""

import sys
import textwrap
import time

import pytest

from orogen.simulate import layout
from orogen.simulate.layout import laid_out

WRITES = textwrap.dedent(
    """
    import os, pathlib, sys, time
    flags = dict(flag.lstrip("-").partition("=")[::2] for flag in os.environ["XLA_FLAGS"].split())
    folder = pathlib.Path(flags["xla_dump_to"])
    print(flags["xla_dump_hlo_module_re"], "mine" in flags, os.environ["JAX_ENABLE_COMPILATION_CACHE"])
    {then}
    """
)


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--mine=1")

    def command(then: str) -> list[str]:
        (tmp_path / "compiles.py").write_text(WRITES.format(then=then))
        return [sys.executable, str(tmp_path / "compiles.py")]

    return command


def test_a_process_is_ended_when_memory_is_laid_out(command):
    then = (
        'report = folder / "m.thunk_sequence.memory-usage-report.txt"; report.write_text("Total bytes: 12"); '
        'time.sleep(0.8); report.write_text("Total bytes: 123456 (0.1MiB)\\n"); time.sleep(60)'
    )
    began = time.monotonic()
    found = laid_out(command(then))
    assert found.bytes == 123456
    assert 0.8 < found.seconds < time.monotonic() - began + 0.1 < 30
    assert found.peak_bytes > 2**20


def test_a_report_that_is_written_just_before_the_process_ends_is_read(command, monkeypatch):
    looks, reported = [], layout._reported

    def late(folder):
        looks.append(reported(folder))
        if len(looks) > 1:
            return looks[-1]
        while reported(folder) is None:  # the process ends between this look and the next
            time.sleep(0.05)
        time.sleep(1)
        return None

    monkeypatch.setattr(layout, "_reported", late)
    then = '(folder / "m.memory-usage-report.txt").write_text("Total bytes: 123456 (0.1MiB)\\n")'
    assert laid_out(command(then)).bytes == 123456 and looks == [None, 123456]


def test_a_process_that_lays_out_nothing_is_an_error_with_its_words(command):
    with pytest.raises(RuntimeError, match=r"exit status 3 before memory was laid out: jit_step True 0\nno card"):
        laid_out(command('sys.stdout.flush(); sys.stderr.write("no card\\n"); sys.exit(3)'))
    with pytest.raises(TimeoutError, match=r"memory was not laid out within 0.5 s"):
        laid_out(command("time.sleep(60)"), limit_s=0.5)
