"""Batches from JSONL to JSONL: what lines ask, and runs that are killed and go on."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.infer.batch import Summary, run_batch
from orogen.infer.lines import LineReader, digest
from orogen.infer.messages import check_messages
from orogen.infer.request import Chosen, Full, Output, Request


class Echo:
    """An engine of two slots and one place in its queue. It answers a prompt of n tokens with them, from the last to
    the first, one per round; 13 makes a request fail, and a prompt of more than 9 never fits."""

    def __init__(self, *, kill_after: int | None = None):
        self.open: dict[int, list[int]] = {}
        self.requests: list[Request] = []
        self.kill_after = kill_after

    @property
    def busy(self) -> bool:
        return bool(self.open)

    def submit(self, request: Request) -> int:
        if len(request.prompt) > 9:
            raise ConfigError(f"a prompt of {len(request.prompt)} tokens; expected at most 9")
        if len(self.open) == 3:
            raise Full("1 request waits")
        self.requests.append(request)
        self.open[len(self.requests)] = list(request.prompt)
        return len(self.requests)

    def step(self) -> list[Output]:
        outputs = []
        for number in list(self.open)[:2]:
            token = self.open[number].pop()
            finish, error = (None, None) if self.open[number] else ("stop", None)
            if token == 13:
                finish, error = "error", "logits are not finite"
            if finish:
                del self.open[number]
            logprobs = self.requests[number - 1].logprobs
            top = tuple((i, -float("inf") if i else -0.5) for i in range(logprobs or 0))
            chosen = Chosen(token, None if logprobs is None else -0.25, top)
            outputs.append(Output(number, (chosen,), f"<{token}>", finish, error))
        if self.kill_after is not None:
            self.kill_after -= 1
            if not self.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
        return outputs


def batch(folder, *lines: str | bytes, engine: Echo | None = None, settings: str = "s", seed: int = 0) -> Summary:
    (folder / "in.jsonl").write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    reader = LineReader({"max_tokens": 7}, encode=lambda text: [ord(c) for c in text], seed=seed)
    return run_batch(engine or Echo(), folder / "in.jsonl", folder / "out.jsonl", reader=reader, settings=settings)


def answers(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


LINES = [
    '{"prompt": [1, 2, 3, 4, 5]}',
    '{"prompt": [6], "id": "b"}',
    "",
    '{"prompt": "é!", "id": 7}',
    '{"prompt": [9]}',
]


def test_answers_are_in_the_order_of_the_input(tmp_path, capfd):
    assert batch(tmp_path, *LINES) == Summary(4, 0, 0)
    found = answers(tmp_path)
    assert [a.pop("digest") for a in found] == [digest(line.encode(), "s") for line in LINES if line]
    assert found == [
        {"line": 1, "text": "<5><4><3><2><1>", "tokens": [5, 4, 3, 2, 1], "finish": "stop"},
        {"line": 2, "id": "b", "text": "<6>", "tokens": [6], "finish": "stop"},
        {"line": 4, "id": 7, "text": "<33><233>", "tokens": [33, 233], "finish": "stop"},
        {"line": 5, "text": "<9>", "tokens": [9], "finish": "stop"},
    ]
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("line 4/4  ") and "tokens/s" in err


def test_logprobs_are_numbers_or_null(tmp_path):
    batch(tmp_path, '{"prompt": [3, 4], "logprobs": 2}')
    (one,) = answers(tmp_path)
    assert one["logprobs"] == [-0.25, -0.25] and one["top"] == [[[0, -0.5], [1, None]]] * 2


def test_a_prompt_of_one_token_has_scores_too(tmp_path):
    """Of its first token nothing is known, as the server says. Of a request that failed there is nothing to tell."""
    of_13 = '{"prompt": [13], "prompt_logprobs": 0}'
    batch(tmp_path, '{"prompt": [3], "prompt_logprobs": 2}', '{"prompt": [3]}', of_13)
    scored, plain, failed = answers(tmp_path)
    assert scored["prompt_logprobs"] == scored["prompt_top"] == [None]
    assert "prompt_logprobs" not in plain and "prompt_logprobs" not in failed and failed["finish"] == "error"


BROKEN = {
    '{"prompt": [1]': "Expecting ',' delimiter at line 1, column 15; expected JSON",
    '["prompt"]': "line 2 holds list; expected a JSON object",
    '{"max_tokens": 3}': "it has no prompt and messages; expected one of them",
    '{"prompt": "a", "messages": []}': "it has both prompt and messages; expected one of them",
    '{"messages": [{"role": "user", "content": "a"}]}': "the checkpoint no chat template; expected a prompt",
    '{"prompt": [1, -2]}': "line 2: prompt is [1, -2]; expected a string or a list of a whole number from 0",
    '{"prompt": [1, true]}': "prompt is [1, True]; expected",
    '{"prompt": []}': "Request.prompt is (); expected at least one token",
    '{"prompt": "a", "temprature": 1}': "'temprature' is no field of a request; expected some of budget,",
    '{"prompt": "a", "sampling": {}}': "'sampling' is no field of a request",
    '{"prompt": "a", "top_p": 2}': "Sampling.top_p is 2; expected above 0 up to 1",
    '{"prompt": "a", "max_tokens": 1.5}': "Request.max_tokens is 1.5; expected a value of type int",
    '{"prompt": "a", "budget": {"tokns": 5}}': "budget is {'tokns': 5}; expected an object of form, tokens",
    '{"prompt": "a", "budget": 5}': "Request.budget is 5; expected",
    '{"prompt": "a", "id": NaN}': "id is nan; expected a string or a whole number or null",
    '{"prompt": "a", "id": "\\ud800"}': "has a lone surrogate",
    '{"prompt": "0123456789"}': "a prompt of 10 tokens; expected at most 9",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_named_and_the_others_go_on(tmp_path, capfd, line):
    summary = batch(tmp_path, LINES[1], line, LINES[4])
    assert summary == Summary(3, 1, 0) and summary.status == 2
    first, broken, last = answers(tmp_path)
    assert [first["text"], last["text"]] == ["<6>", "<9>"]
    assert broken["line"] == 2 and "finish" not in broken
    assert broken["error"].startswith("line 2") and BROKEN[line] in broken["error"]
    told = [x for x in capfd.readouterr().err.splitlines() if x.startswith("orogen: ")]
    assert told == [f"orogen: {tmp_path / 'in.jsonl'} {broken['error']}"]


def test_lines_that_are_not_utf8_are_broken(tmp_path):
    assert batch(tmp_path, b'{"prompt": "\xff"}', LINES[1]).broken == 1
    assert "byte 12 is not UTF-8" in answers(tmp_path)[0]["error"]


def test_a_request_that_fails_takes_no_other_with_it(tmp_path):
    summary = batch(tmp_path, '{"prompt": [13, 2, 3], "id": 1}', LINES[1])
    assert summary == Summary(2, 0, 1) and summary.status == 1
    failed, other = answers(tmp_path)
    assert failed["error"] == "logits are not finite" and failed["finish"] == "error" and failed["id"] == 1
    assert failed["tokens"] == [3, 2, 13] and other["finish"] == "stop"
    assert batch(tmp_path, '{"prompt": [13, 2, 3], "id": 1}', LINES[1]) == summary


def test_broken_lines_decide_the_status_before_failed_requests():
    assert [Summary(9, *counts).status for counts in ((0, 0), (0, 1), (1, 0), (1, 1))] == [0, 1, 2, 2]


def test_an_empty_input_has_an_empty_output(tmp_path):
    summary = batch(tmp_path, "", " ")
    assert summary == Summary(0, 0, 0) and summary.status == 0 and answers(tmp_path) == []


SCRIPT = """
import sys, pathlib
sys.path.insert(0, {tests!r})
from test_batch import Echo, LineReader, run_batch
folder = pathlib.Path({folder!r})
reader = LineReader({{"max_tokens": 7}})
run_batch(Echo(kill_after=6), folder / "in.jsonl", folder / "out.jsonl", reader=reader, settings="s")
"""


def test_a_killed_run_goes_on(tmp_path):
    """What was finished is not computed again, though a line before it was not."""
    lines = ['{"prompt": [1, 2, 3, 4, 5, 6, 7]}', '{"prompt": [8, 9]}', '{"prompt": [10]}', '{"prompt": [11]}']
    (tmp_path / "in.jsonl").write_text("".join(line + "\n" for line in lines))
    script = SCRIPT.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert names(tmp_path) == ["in.jsonl", "out.jsonl.journal"]
    engine = Echo()
    assert batch(tmp_path, *lines, engine=engine) == Summary(4, 0, 0)
    assert [r.prompt for r in engine.requests] == [(1, 2, 3, 4, 5, 6, 7)]
    assert [(a["line"], len(a["tokens"])) for a in answers(tmp_path)] == [(1, 7), (2, 2), (3, 1), (4, 1)]
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]


def test_a_torn_answer_is_computed_again(tmp_path):
    batch(tmp_path, *LINES)
    whole = (tmp_path / "out.jsonl").read_bytes()
    second = whole.index(b"\n") + 1
    for kept in (0, 1, second - 1, second, second + 1, len(whole) - 1, len(whole)):
        (tmp_path / "out.jsonl").unlink()
        (tmp_path / "out.jsonl.journal").write_bytes(whole[:kept])
        engine = Echo()
        batch(tmp_path, *LINES, engine=engine)
        assert (tmp_path / "out.jsonl").read_bytes() == whole
        assert len(engine.requests) == 4 - whole[:kept].count(b"\n")


def test_a_run_is_killed_twice(tmp_path):
    """The line that the first kill tore must not spoil the journal of the second run."""
    batch(tmp_path, *LINES)
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").rename(tmp_path / "out.jsonl.journal")
    (tmp_path / "out.jsonl.journal").write_bytes(whole[: whole.index(b"\n") + 20])

    class Interrupted(Echo):
        def step(self) -> list[Output]:
            if len(self.requests) == 3 and len(self.open) < 3:
                raise KeyboardInterrupt
            return super().step()

    with pytest.raises(KeyboardInterrupt):
        batch(tmp_path, *LINES, engine=Interrupted())
    assert (tmp_path / "out.jsonl.journal").read_bytes().count(b"\n") == 2
    batch(tmp_path, *LINES)
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_complete_output_is_left_as_it_is(tmp_path):
    batch(tmp_path, *LINES, "{")
    before = (tmp_path / "out.jsonl").stat()
    (tmp_path / "out.jsonl.journal").write_bytes(b"left behind")
    engine = Echo()
    assert batch(tmp_path, *LINES, "{", engine=engine) == Summary(5, 1, 0)
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == before.st_mtime_ns and engine.requests == []
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]


def test_answers_to_other_lines_are_noticed(tmp_path):
    batch(tmp_path, *LINES)
    with pytest.raises(ConfigError, match=r"out.jsonl has an answer to another line 2 than .*in.jsonl has"):
        batch(tmp_path, LINES[0], '{"prompt": [7]}', *LINES[2:])
    with pytest.raises(ConfigError, match="or under other settings"):
        batch(tmp_path, *LINES, settings="t")
    with pytest.raises(ConfigError, match="answers 4 of 5 lines"):
        batch(tmp_path, *LINES, LINES[0])
    (tmp_path / "out.jsonl").rename(tmp_path / "out.jsonl.journal")
    before = (tmp_path / "out.jsonl.journal").read_bytes()
    with pytest.raises(ConfigError, match="journal has an answer to another line 1"):
        batch(tmp_path, *LINES, settings="t")
    assert (tmp_path / "out.jsonl.journal").read_bytes() == before
    (tmp_path / "out.jsonl.journal").write_bytes(before + before)
    with pytest.raises(ConfigError, match="line 5 answers line 1 once more"):
        batch(tmp_path, *LINES)
    (tmp_path / "out.jsonl").write_text("precious\n")
    with pytest.raises(ConfigError, match=r"out.jsonl line 1: Expecting value"):
        batch(tmp_path, *LINES)
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"


def test_two_runs_do_not_write_one_output(tmp_path):
    import fcntl

    with (tmp_path / "out.jsonl.journal").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(ConfigError, match="is being written by another process"):
            batch(tmp_path, *LINES)


def test_a_pipe_is_read_to_its_end_first(tmp_path, capsys):
    """And names itself in messages; a file with its lines continues what was begun from it."""
    pipe, out = tmp_path / "pipe", tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    data = b'{"prompt": [1, 2]}\n\nno line\n{"prompt": [3]}'
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    assert run_batch(Echo(), pipe, out, reader=LineReader({"max_tokens": 5}), settings="") == Summary(3, 1, 0)
    writer.join()
    assert [json.loads(line)["line"] for line in out.read_text().splitlines()] == [1, 3, 4]
    assert f"orogen: {pipe} line 3" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_bytes(data)
    assert run_batch(Echo(), tmp_path / "in.jsonl", out, reader=LineReader({"max_tokens": 5}), settings="").lines == 3


def test_what_cannot_be_read_is_no_input(tmp_path):
    with pytest.raises(ConfigError, match="Is a directory; expected a file or a pipe of lines"):
        run_batch(Echo(), tmp_path, tmp_path / "out.jsonl", reader=LineReader({}), settings="")


def test_the_command_answers_lines_by_an_engine(tmp_path, capsys, monkeypatch):
    importlib.import_module("orogen.infer.generate")  # else it keeps the stand-in if it is imported here first
    monkeypatch.setattr("orogen.infer.engine.Engine", lambda opened, config: Echo())
    folder = Path(__file__).parent.parent / "fixtures" / "models" / "nemotron_h_dense"
    (tmp_path / "in.jsonl").write_text('{"prompt": [3, 1], "max_tokens": 4, "id": 1}\n{"prompt": "no tokenizer"}\n')
    command = ["generate", "--checkpoint", folder, "--input", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"]
    assert main([*map(str, command), "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {
        "out": str(tmp_path / "out.jsonl"), "lines": 2, "broken": 1, "failed": 0,
    }  # fmt: skip
    done, broken = answers(tmp_path)
    assert done["id"] == 1 and done["tokens"] == [1, 3]
    assert "the checkpoint has no tokenizer" in broken["error"]


def test_the_command_refuses_half_of_it(refused, tmp_path):
    (tmp_path / "in.jsonl").write_text("")
    for options in (["--input", tmp_path / "in.jsonl"], ["--out", "out.jsonl"]):
        assert "expected one of them, the last two together" in refused("generate", "--checkpoint", tmp_path, *options)
    options = "--input", tmp_path / "none.jsonl", "--out", tmp_path / "out.jsonl"
    assert "expected a file or pipe, and a file in a folder that exists" in refused(
        "generate", "--checkpoint", tmp_path, *options
    )


def test_progress_counts_in_its_unit():
    from orogen.report.metrics import Progress

    stream = io.StringIO()
    with Progress(3, unit="line", stream=stream) as progress:
        progress.update(3, {"tokens_per_second": 1234.5})
    assert stream.getvalue().startswith("line 3/3  1,234 tokens/s")


def test_arguments_that_nest_too_deeply_end_no_batch(tmp_path):
    def render(asked) -> list[int]:
        return [len(check_messages(asked["messages"]))]

    def line(depth: int) -> str:
        function = {"name": "a", "arguments": '{"a": ' + "[" * depth + "]" * depth + "}"}
        return json.dumps({"messages": [{"role": "assistant", "tool_calls": [{"function": function}]}]})

    (tmp_path / "in.jsonl").write_text("\n".join([line(600), line(63)]) + "\n")
    reader = LineReader({"max_tokens": 7}, render=render)
    assert run_batch(Echo(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", reader=reader, settings="") == (2, 1, 0)
    first, second = answers(tmp_path)
    assert "it nests more than 64 deep" in first["error"] and second["finish"] == "stop"
