"""Answers every line of a JSONL file, whatever happens meanwhile.

Answers go to a journal beside the output, OUT.journal, in the order in which they come. Once all are there the output
is made of it, in the order of the input, whole or not at all, and the journal goes. A run that was killed goes on from
its journal: no finished line is computed again, none is answered twice, and the line that a kill tore is cut off. Each
answer has a digest of its line and of the settings, so that answers to other lines are noticed. An output that is
complete is left as it is.

A line that cannot be read, or that can never be run, is answered by what was wrong, and named on stderr; the others go
on. Exit status: 2 if there was such a line, else 1 if a request failed in the engine, else 0.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from orogen.config.checks import ConfigError
from orogen.config.json_file import Record, Whole, read_object
from orogen.config.streams import say
from orogen.infer.lines import Line, LineReader, answer, digest, refusal, told
from orogen.infer.request import ERROR, Chosen, Full, Output, Request
from orogen.report.metrics import Progress

_ANSWER = Record({"line": Whole(1), "digest": str}, {"error": str, "finish": str})


class Stepped(Protocol):
    """What a batch needs of an engine."""

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        ...

    def submit(self, request: Request) -> int:
        """The request's number. Raises ConfigError for one that can never run, Full for one that must wait."""
        ...

    def step(self) -> list[Output]:
        """One round for all that run."""
        ...


class Summary(NamedTuple):
    """lines: of the input. broken: those that could not be read or run. failed: those that ended with an error."""

    lines: int
    broken: int
    failed: int

    @property
    def status(self) -> int:
        """The exit status."""
        return 2 if self.broken else 1 if self.failed else 0


def run_batch(engine: Stepped, source: Path, out: Path, *, reader: LineReader, settings: str) -> Summary:
    """Answers the lines of `source` in `out`; blank ones have none. A pipe is read to its end first.

    settings: all that answers depend on besides their lines, as text. Raises ConfigError if `out` or its journal has
    answers to other lines or settings, or if another process is at work on it, before anything is computed.
    """
    with _twice_readable(source) as lines:
        return _run_batch(engine, lines, out, reader=reader, settings=settings)


def _run_batch(engine: Stepped, source: "_Source", out: Path, *, reader: LineReader, settings: str) -> Summary:
    lines = sum(1 for _ in _lines(source, settings))
    if out.exists():
        with out.open("rb") as file:
            done = _index(file, out)
        _require_same(done, source, out, settings)
        if len(done) < lines:
            raise ConfigError(f"{out} answers {len(done)} of {lines} lines of {source}; expected all, or no such file")
        _journal_of(out).unlink(missing_ok=True)  # of a run that ended between the two
        return _summary(done, lines)
    with _locked(_journal_of(out)) as journal:
        done = _index(journal, _journal_of(out))
        _require_same(done, source, _journal_of(out), settings)
        journal.truncate(max((extent.end for extent in done.values()), default=0))
        journal.seek(0, os.SEEK_END)
        with Progress(lines, first_step=len(done), unit="line") as progress:
            _Run(engine, source, journal, reader, progress).answer_all(settings, done)
        _finish(journal, done, out)
    return _summary(done, lines)


class _Source(NamedTuple):
    """A file of lines, and its name in messages."""

    path: Path
    name: str

    def __str__(self) -> str:
        return self.name


@contextlib.contextmanager
def _twice_readable(path: Path) -> Iterator[_Source]:
    """The file, or a copy of what a pipe gives: lines are read once for their digests, and again for their requests."""
    if path.is_file() or not path.exists():
        yield _Source(path, str(path))
        return
    with tempfile.NamedTemporaryFile("wb", prefix="orogen-", suffix=".jsonl") as copy:
        try:
            with path.open("rb") as pipe:
                shutil.copyfileobj(pipe, copy)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; expected a file or a pipe of lines") from None
        copy.flush()
        yield _Source(Path(copy.name), str(path))


class _Extent(NamedTuple):
    """Where an answer is in its file, in bytes, and what kind of answer it is."""

    start: int
    end: int
    digest: str
    broken: bool
    failed: bool


class _Open:
    """A line whose request the engine has, and what has come of it."""

    def __init__(self, line: Line, request: Request):
        self.line, self.scored = line, request.prompt_logprobs is not None
        self.chosen: list[Chosen] = []
        self.prompt: tuple[Chosen, ...] = ()
        self.texts: list[str] = []


class _Run:
    """One pass over the input, whose answers go to the journal."""

    def __init__(self, engine: Stepped, source: _Source, journal: IO[bytes], reader: LineReader, progress: Progress):
        self._engine, self._source, self._journal = engine, source, journal
        self._reader, self._progress = reader, progress
        self._open: dict[int, _Open] = {}

    def answer_all(self, settings: str, done: dict[int, _Extent]) -> None:
        """Adds what is missing to `done`."""
        requests = self._requests(settings, done)
        waiting = next(requests, None)
        tokens, since = 0, time.monotonic()
        while waiting is not None or self._open:
            while waiting is not None and self._takes(*waiting, done):
                waiting = next(requests, None)
            for output in self._engine.step() if self._open else ():
                tokens += len(output.tokens)
                self._add(output, done)
            self._progress.update(len(done), {"tokens_per_second": tokens / max(time.monotonic() - since, 1e-9)})

    def _requests(self, settings: str, done: dict[int, _Extent]) -> Iterator[tuple[Line, Request]]:
        """Those of the lines that are not done; broken ones are answered on the way."""
        for line in _lines(self._source, settings):
            if line.number in done:
                continue
            try:
                request = self._reader.read(line)
            except ConfigError as error:
                self._refuse(line, str(error), done)
            else:
                yield line, request

    def _takes(self, line: Line, request: Request, done: dict[int, _Extent]) -> bool:
        """Whether the engine has dealt with the request: it waits here no more."""
        try:
            number = self._engine.submit(request)
        except ConfigError as error:
            self._refuse(line, f"line {line.number}: {error}", done)
        except Full:
            if not self._open:
                raise  # nothing that could make room is ours
            return False
        else:
            self._open[number] = _Open(line, request)
        return True

    def _refuse(self, line: Line, error: str, done: dict[int, _Extent]) -> None:
        error = " ".join(error.split())
        say(f"orogen: {self._source} {error}")
        self._write(line, refusal(line, error), done)

    def _add(self, output: Output, done: dict[int, _Extent]) -> None:
        one = self._open[output.number]
        one.chosen += output.tokens
        one.prompt += output.prompt
        one.texts.append(output.text)
        if output.finish is not None:
            del self._open[output.number]
            text, error = "".join(one.texts), output.error
            scored = one.scored and (one.prompt or error is None)  # of one token there are none
            facts = told(chosen=one.chosen, text=text, finish=output.finish, prompt=one.prompt if scored else None)
            self._write(one.line, answer(one.line, facts, error=error), done)

    def _write(self, line: Line, facts: dict[str, Any], done: dict[int, _Extent]) -> None:
        data = json.dumps(facts, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        start = self._journal.tell()
        self._journal.write(data)
        self._journal.flush()
        done[line.number] = _extent(facts, start, start + len(data))


def _extent(facts: dict[str, Any], start: int, end: int) -> _Extent:
    broken = "finish" not in facts
    return _Extent(start, end, facts["digest"], broken, facts.get("finish") == ERROR)


def _journal_of(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def _lines(source: _Source, settings: str) -> Iterator[Line]:
    """The lines that have an answer: those that are not blank."""
    with source.path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if data := data.strip():
                yield Line(number, data, digest(data, settings))


def _locked(path: Path) -> IO[bytes]:
    """The file, open for reading and writing by this process alone. Raises ConfigError if another one has it."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"{path} is being written by another process; expected one run at a time") from None
    return file


def _index(file: IO[bytes], path: Path) -> dict[int, _Extent]:
    """The answers in a file, by line. The last one counts only if its line is whole. Raises ConfigError for others."""
    extents: dict[int, _Extent] = {}
    file.seek(0)
    start = 0
    for row, data in enumerate(file, 1):
        if not data.endswith(b"\n"):
            break
        where = f"{path} line {row}"
        facts = read_object(data, _ANSWER, where=where)
        if facts["line"] in extents:
            raise ConfigError(f"{where} answers line {facts['line']} once more; expected each line once")
        extents[facts["line"]] = _extent(facts, start, start + len(data))
        start += len(data)
    return extents


def _require_same(done: dict[int, _Extent], source: _Source, path: Path, settings: str) -> None:
    """Raises ConfigError if an answer is not of this input under these settings."""
    digests = {line.number: line.digest for line in _lines(source, settings)} if done else {}
    for number, extent in done.items():
        if digests.get(number) != extent.digest:
            raise ConfigError(
                f"{path} has an answer to another line {number} than {source} has, or under other settings; expected "
                "the same, or a new output"
            )


def _finish(journal: IO[bytes], done: dict[int, _Extent], out: Path) -> None:
    """Makes the output of the journal, in the order of the input, and removes the journal."""
    temporary = out.with_name(out.name + ".tmp")
    with temporary.open("wb") as file:
        for _, extent in sorted(done.items()):
            journal.seek(extent.start)
            file.write(journal.read(extent.end - extent.start))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(out)
    _journal_of(out).unlink()


def _summary(done: dict[int, _Extent], lines: int) -> Summary:
    return Summary(lines, sum(one.broken for one in done.values()), sum(one.failed for one in done.values()))
