"""Programs that must pass their tests: what the sandbox keeps from them, and how it ends them."""

import shutil
import textwrap
import time
import uuid
from pathlib import Path

import pytest
from tests.posttrain.environments.tasks import lines, made, reward

from orogen.config.checks import ConfigError
from orogen.posttrain.environments import code, sandbox
from orogen.posttrain.environments.code import program_of

STDIN = {"prompt": "double", "tests": [{"input": "2\n", "output": "4"}, {"input": "5", "output": "10\n"}]}
CHECK = {"prompt": "half", "check": "assert half(4) == 2\nassert half(3) == 1.5"}


# What it finds must hold the mark, which it does not hold itself. Of pipes it reads none: they are another's.
SPY = """
import glob, os, stat
def read(path):
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return b''
        with open(path, 'rb') as file:
            return file.read(2**20)
    except OSError:
        return b''
def every(*patterns):
    return b''.join(read(path) for pattern in patterns for path in glob.glob(pattern))
half = None if ({mark!r}[::-1]).encode() in {found} else lambda x: x / 2
"""
# It takes every descriptor of process 1, and writes to it as bubblewrap tells the exit status.
THIEF = """
import ctypes, os, struct, time
libc, first = ctypes.CDLL(None), os.pidfd_open(1)
for number in range(64):
    taken = libc.syscall(438, first, number, 0)
    if taken >= 0:
        os.write(taken, struct.pack('Q', 1))
time.sleep(0.5)
"""
CHEAT = """
class Equal(float):
    __eq__ = lambda self, other: True
AssertionError = Exception
__builtins__['AssertionError'] = print
half = lambda x: Equal(7)
"""


@pytest.mark.parametrize(
    ("number", "program", "expected"),
    [
        (0, "x = int(input())\nprint(2 * x)", 1),
        (0, "So:\n```python\nprint(2 * int(input()), '')\n```\nDone.", 1),
        (0, "x = int(input())\nprint(x * x)", 0),  # right for the first test alone
        (0, "print(4)\n1 / 0", 0),
        (1, "def half(x):\n    return x / 2", 1),
        (1, "def half(x):\n    return x // 2", 0),
        (1, "import os\nos._exit(0)", 0),  # before the check
        (1, "import socket\nhalf = lambda x: x / 2\nwhile True: pass", 0),
        (1, "", 0),
        (1, "half = lambda x: x / 2\nprint('noise')\nabs = lambda x: 0", 1),
        (1, CHEAT, 0),
    ],
)
def test_a_program_must_pass_all_its_tests(tmp_path, number, program, expected):
    environment = made("code", corpus=lines(tmp_path, STDIN, CHECK), unsandboxed=True, seconds=1.0)
    assert reward(environment, program, number) == expected


BOXES = pytest.mark.parametrize(
    "unsandboxed", [True, pytest.param(False, marks=pytest.mark.skipif(not shutil.which("bwrap"), reason="no bwrap"))]
)


@BOXES
@pytest.mark.parametrize(
    "found",
    [
        "os.pread(0, 2**20, 0)", "every('*', '/tmp/task/*')", "every('/proc/1/fd/0')",
        "every(*(f'/proc/{os.getppid()}/{name}' for name in ('fd/*', 'environ', 'cmdline')))",
        "every('/proc/[0-9]*/fd/*')",
    ],
)  # fmt: skip
def test_a_program_finds_no_check(tmp_path, found, unsandboxed):
    """Neither on stdin nor in files, nor in what other processes have open."""
    mark = uuid.uuid4().hex
    corpus = lines(tmp_path, CHECK | {"check": f"{CHECK['check']}  # {mark}"})
    environment = made("code", corpus=corpus, unsandboxed=unsandboxed, seconds=20.0)
    assert reward(environment, SPY.format(found=found, mark=mark[::-1])) == 1
    assert reward(environment, "half = None") == 0


@pytest.mark.skipif(not shutil.which("bwrap"), reason="no bwrap")
def test_a_program_cannot_say_that_it_has_passed(tmp_path):
    assert reward(made("code", corpus=lines(tmp_path, CHECK), seconds=20.0), THIEF) == 0


def test_a_sandbox_in_which_no_check_runs_is_refused(monkeypatch, tmp_path):
    """Else it would call every program wrong."""
    monkeypatch.setattr(code, "_CHECKED", code._CHECKED.replace("import ctypes", "import no_ctypes"))
    why = "a check of a right program does not run in the sandbox: .*No module named 'no_ctypes'; expected .*ctypes"
    for fields in ({}, {"corpus": lines(tmp_path, STDIN, CHECK)}):
        with pytest.raises(ConfigError, match=why):
            made("code", unsandboxed=True, **fields)
    made("code", unsandboxed=True, corpus=lines(tmp_path, STDIN))


@pytest.mark.parametrize(
    ("source", "end"),
    [
        ("print('a')", "finished"),
        ("raise SystemExit(3)", "failed"),
        ("while True: print('x' * 4096)", "flood"),
        ("import time\ntime.sleep(60)", "timeout"),
        ("x = bytearray(2**29)", "failed"),
        ("open('big', 'wb').write(bytes(2**22))", "failed"),
    ],
)
def test_a_program_keeps_to_its_limits(source, end):
    began = time.monotonic()
    box = sandbox.Sandbox(seconds=0.5, memory=2**28, unsandboxed=True)
    found = box.run(source)
    assert found.end == end and len(found.output) <= sandbox.MOST_OUTPUT
    assert time.monotonic() - began < 20


def test_a_program_finds_itself_alone_in_main():
    """Though the interpreter has set its limits before."""
    source = """
        from __future__ import annotations
        import dataclasses, pickle, sys
        print(sorted(name for name in globals() if not name.startswith("__")), __name__, sys.argv == [__file__])
        @dataclasses.dataclass
        class Point:
            x: list[int]
        print(pickle.loads(pickle.dumps(Point([3]))), sys.modules["__main__"].Point is Point)
        def f(n): return 0 if n == 0 else 1 + f(n - 1)
        print(f(900))
        """
    box = sandbox.Sandbox(seconds=5, memory=2**28, unsandboxed=True)
    lines = box.run(textwrap.dedent(source)).output.decode().splitlines()
    assert lines[0] == "['annotations', 'dataclasses', 'pickle', 'sys'] __main__ True"
    assert lines[1:] == ["Point(x=[3]) True", "900"]


def test_children_of_a_program_end_with_it(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time\ntime.sleep(1.5)\nopen({str(mark)!r}, 'w')"
    box = sandbox.Sandbox(seconds=0.4, memory=2**28, unsandboxed=True)
    box.run(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}]).wait()")
    time.sleep(2)
    assert not mark.exists()


@pytest.mark.skipif(not shutil.which("bwrap"), reason="no bwrap")
def test_a_program_in_bubblewrap_does_not_outlive_it():
    """Though it would rather not die with its parent."""
    mark = uuid.uuid4().hex
    box = sandbox.Sandbox(seconds=1, memory=2**28)
    source = f"""
        import ctypes, subprocess, sys
        libc, wait = ctypes.CDLL(None), "import time; time.sleep(20)"
        if libc.prctl(1, 0, 0, 0, 0) == 0:
            print("undone", flush=True)
        subprocess.run([sys.executable, "-c", wait, "{mark}"])
        """
    assert box.run(textwrap.dedent(source)) == sandbox.Ran("timeout", b"undone\n")
    time.sleep(0.5)
    words = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [one for one in words if mark.encode() in one]


def test_code_needs_bubblewrap_unless_that_is_allowed(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="bubblewrap, and `bwrap` is not on the PATH; expected it, or .*unsandboxed"):
        made("code")


def test_bubblewrap_has_neither_network_nor_files(monkeypatch, tmp_path):
    """A stand-in for bwrap writes down its arguments and says what the program of the first trial does."""
    tool = tmp_path / "bwrap"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\nprintf "started\\n1\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: str(tool))
    box = sandbox.Sandbox(seconds=5, memory=2**30)
    assert box.run("").output == b"1\n"
    assert "--as-pid-1" not in (tmp_path / "words").read_text()  # it would have itself not die with bubblewrap
    box.run("", trusted=True)
    words = (tmp_path / "words").read_text().split()
    options, program = words[: words.index("--")], words[words.index("--") + 1 :]
    assert all(options[n - 2] == "--size" for n, word in enumerate(options) if word == "--tmpfs")
    binds = [n for n, word in enumerate(options) if word == "--ro-bind"]
    assert options.index("/tmp") < min(binds) and {"/tmp", "/dev/shm"} <= set(options)
    assert {"--unshare-all", "--as-pid-1", "--die-with-parent", "--new-session", "--clearenv", "--tmpfs"} <= set(
        options
    )
    assert "--bind" not in options and "--share-net" not in options and program[-1] == "/tmp/task/main.py"
    assert str(tmp_path) not in options


def test_a_sandbox_that_cannot_start_is_no_wrong_answer(monkeypatch, tmp_path):
    tool = tmp_path / "bwrap"
    tool.write_text("#!/bin/sh\necho 'bwrap: no permissions' >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: str(tool))
    with pytest.raises(ConfigError, match="does not run in the sandbox: bwrap: no permissions; expected"):
        made("code")
    monkeypatch.setattr(sandbox.Sandbox, "require", lambda *_, **__: None)  # it works at first, then no more
    environment = made("code", corpus=lines(tmp_path, STDIN, CHECK))
    for number in (0, 1):
        with pytest.raises(sandbox.SandboxError, match="did not start: bwrap: no permissions"):
            reward(environment, "print(4)", number)


def test_the_last_block_of_code_counts():
    assert program_of("a\n```py\nb\n```\nc\n```\nd\n```") == "d\n"
    assert program_of("no code") == "no code"
