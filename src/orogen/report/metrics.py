"""The metrics of a run, step by step: `metrics.jsonl`, loggers such as TensorBoard, and a progress line for people.

Each line of `metrics.jsonl` is the JSON object of one step; steps strictly increase. Its keys:

    step                  optimizer steps done, from 1
    objective             what the step minimised, router losses included
    loss                  nats per predicted token of this step's batch; `mtp_loss` likewise, a list over depths; other
                          tasks have metrics of their own
    tokens                tokens of this step's batch; summed over all lines, what the run has trained on
    tokens_per_second, step_ms, grad_norm, learning_rate: in steps that measure what rounding loses, the time contains
                          the measurement, which is two more forward and backward passes
    mfu                   0 to 1, over all devices; counts the operations of each document as if it were alone in its
                          sequence
    expert_load           [MoE layer][expert]: (token, expert) assignments of the router in this step, drops included
    dropped_tokens        how many of those assignments no expert computed; a number, or a list over MoE layers
    heldout_loss          nats per token of a fixed sample of the held-out text; only in steps that evaluate
    heldout_bits_per_byte the same in bits per byte of that text
    whole_heldout_loss, whole_heldout_bits_per_byte: of the whole held-out text; only in the run's last step
    heldout_loss/NAME, …  each of these four of one source, with several (DataConfig.sources)
    phase, share/NAME, epochs/NAME: with several sources or phases, the phase, from 0; by source, its share of the
                          tokens since the shares last changed, and how often its documents have been read
    evaluate/TASK/METRIC  what the model achieves on a task of EvaluateConfig; only in steps that evaluate tasks
    overflow_rows         assignments that did not fit into a ragged buffer; a step with any is skipped
    skipped_steps         steps skipped since the run began
    spike_bound           the loss exceeds this bound: it is a spike (`train.health`); only in such steps
    start_seconds         from the start of the process, or a roll-back, to the first step; only in that step
    compile_seconds       tracing, lowering and compiling the step, or what measures it; only in the first of a process,
                          the first that measures, and where a recipe changes
    evaluate_seconds      the evaluation after this step
    save_seconds          how long writing checkpoints held the run up since the last step; in the last step of a
                          process also how long it then waited for the last one
    rounding_flushed, rounding_saturated, rounding_zeros, rounding_nonfinite: {operand: {layer: share}} of an operand's
                          numbers: turned into 0, beyond the largest number of their block, 0 before, not finite; only
                          in steps that measure (`PrecisionConfig.health_every`), as are the next six
    rounding_log2_scale   {operand: {layer: mean of log2 of its blocks' scales}}; null where all are 0
    most_flushed, least_cosine: the largest of rounding_flushed, the least of gradient_cosine
    gradient_cosine       [layer]: between the gradients of its matrices with rounded operands and without
    gradient_zeros, plain_gradient_zeros: [layer]: the shares of their elements that are 0
    host_ms, device_ms    by process, with several: median time to dispatch a step, and of a product on its devices
    slow_processes        those whose times are far above the others' (`train.stragglers`)

Only `step` is required, and any other key may be added. JSON has no NaN or infinity: such a number is written as null
and listed under the key `nonfinite`, a list of [key, index, …, "nan" | "inf" | "-inf"].
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import rich.console
import rich.progress

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.streams import say
from orogen.report.files import Appended, Events
from orogen.report.loggers import OPENERS, Background, Run, run_id

FILE_NAME = "metrics.jsonl"
NONFINITE = "nonfinite"


class MetricsWriter:
    """Appends to `metrics.jsonl` and sends the same to loggers. For one process per run.

    loggers: `tensorboard` (events under `run_dir/tensorboard`), `wandb`, `trackio`; see `report.loggers` for the last
    two, which are shown `config` and report failures by `log`.
    With `resume_step` s, it first removes the lines of later steps, and a last line torn by a kill: the file ends up
    equal to that of an uninterrupted run, and every line of a step ≤ s stays the same, byte for byte.
    Raises FileExistsError if there are lines already and `resume_step` is None, and ConfigError if a line other than
    the last cannot be read. last: the last record; None if there is none.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        resume_step: int | None = None,
        loggers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
        log: Callable[[str], None] = say,
    ):
        path = Path(run_dir) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            self.last = _truncate(path, resume_step)
        elif path.exists() and path.stat().st_size:
            raise FileExistsError(f"{path} has metrics already; expected none, or a resume_step")
        else:
            self.last = None
        self._path = path
        self._tensorboard, self._others = "tensorboard" in loggers, []
        if others := [name for name in loggers if name in OPENERS]:
            run = Run(path.parent, run_id(path.parent, resumed=bool(resume_step)), config or {})
            self._others = [Background(name, run, log) for name in others]
        self._open(resume_step)

    def _open(self, resume_step: int | None) -> None:
        self._file, self._events = Appended(self._path), None
        if self._tensorboard:
            purge_step = None if resume_step is None else resume_step + 1
            self._events = Events(self._path.parent / "tensorboard", purge_step=purge_step)

    def rewind(self, step: int) -> None:
        """Removes the records of later steps: the run goes on after `step`, as if it resumed there. Loggers other than
        TensorBoard keep what they were sent."""
        self._close_files()
        self.last = _truncate(self._path, step)
        self._open(step)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Writes one step at once. Numbers may be Python's, NumPy's or arrays that have `tolist`.

        Raises ValueError unless `step` is greater than the last one written. A disk that refuses the line does not
        raise: see `report.files`.
        """
        record = {key: _plain(value) for key, value in metrics.items()}
        step = record.get("step")
        before = -1 if self.last is None else self.last["step"]
        if not isinstance(step, int) or step <= before:
            raise ValueError(f"step is {step!r}, expected an integer above {before}")
        self._file.write(f"{_encode(record)}\n".encode())
        self.last = record
        self._draw(step, record)

    def amend(self, metrics: Mapping[str, Any]) -> None:
        """Adds `metrics` to the last record and rewrites its line. Raises OSError if the disk refuses it; then the file
        is as it was."""
        assert self.last is not None
        added = {key: _plain(value) for key, value in metrics.items()}
        amended = self.last | added
        self._file.settle()  # or the last line is not there
        lines = self._path.read_bytes().splitlines(keepends=True)
        write_atomically(self._path, b"".join(lines[:-1]) + f"{_encode(amended)}\n".encode())
        self.last = amended
        self._file.close()
        self._file = Appended(self._path)
        self._draw(self.last["step"], added)

    def _draw(self, step: int, record: Mapping[str, Any]) -> None:
        # TensorBoard draws no others, and tensorboardX warns about each.
        finite = {tag: value for tag, value in _scalars(record) if math.isfinite(value)}
        for logger in ([] if self._events is None else [self._events]) + self._others:
            logger.write(step, finite)

    def _close_files(self) -> None:
        try:
            self._file.close()
        finally:
            if self._events is not None:
                self._events.close()

    def close(self) -> None:
        """Closes the files, and waits for the loggers. Raises OSError if the disk has refused some of the files'
        content until now."""
        try:
            self._close_files()
        finally:
            for logger in self._others:
                logger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records as they were written, NaN and infinities included. A torn last line is left out.

    Raises FileNotFoundError if there is no file, ValueError if a line other than the last cannot be read.
    """
    return [_restore(record) for _, record in _lines(Path(run_dir) / FILE_NAME)]


class Progress:
    """Shows how far a run is, on stderr: a bar on a terminal, elsewhere a line every `every_seconds`.

    with Progress(steps) as progress: … progress.update(step, metrics). first_step: the last step that was done before
    the run resumed. unit: the name of a step. label: of the bar. shown: whether anything is. stream, clock (in
    seconds): for tests.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        unit: str = "step",
        every_seconds: float = 10.0,
        label: str = "train",
        shown: bool = True,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._first_step, self._every_seconds, self._clock = total_steps, first_step, every_seconds, clock
        self._unit, self._label = unit, label
        self._stream = sys.stderr if stream is None else stream
        self._origin: tuple[int, float] | None = None  # the first step seen, and when; compilation came before
        self._printed_at = -math.inf
        console = rich.console.Console(file=self._stream)
        self._bar = _bar(console) if shown and console.is_terminal and not console.is_dumb_terminal else None
        self._shown = shown

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self._label, total=self._total, completed=self._first_step, numbers="", left="-:--:--"
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows this step. Held-out scores always get a line, above a bar too; without a bar so does the last step."""
        now = self._clock()
        self._origin = self._origin or (step, now)
        left = _clock_face(self._seconds_left(step, now))
        scored = _summary(metrics, _HELDOUT)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=_summary(metrics, _LIVE), left=left)
            if scored:
                self._bar.console.print(f"{self._unit} {step}  {scored}", markup=False, highlight=False)
        elif self._shown and (scored or step >= self._total or now - self._printed_at >= self._every_seconds):
            self._printed_at = now
            numbers = _summary(metrics, _LIVE | _HELDOUT)
            print(f"{self._unit} {step}/{self._total}  {numbers}  {left} left", file=self._stream, flush=True)

    def _seconds_left(self, step: int, now: float) -> float | None:
        assert self._origin is not None
        first, since = self._origin
        return (now - since) / (step - first) * (self._total - step) if step > first else None


_LIVE = {"loss": "loss {:.4f}", "tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.1%}"}
_HELDOUT = {"heldout_loss": "held-out loss {:.4f}", "heldout_bits_per_byte": "held-out {:.4f} bits/byte"}


def _summary(metrics: Mapping[str, Any], formats: Mapping[str, str]) -> str:
    """The metrics that are there, as text; with the objective if the task has no metric called `loss`."""
    formats = formats if "loss" in metrics else {"objective": "objective {:.4f}", **formats}
    return "  ".join(text.format(float(metrics[key])) for key, text in formats.items() if metrics.get(key) is not None)


def _bar(console: rich.console.Console) -> rich.progress.Progress:
    numbers, left = map(rich.progress.TextColumn, ("{task.fields[numbers]}", "{task.fields[left]} left"))
    count = rich.progress.MofNCompleteColumn()
    # stdout may carry a JSON answer: the bar must not move it to stderr.
    return rich.progress.Progress(
        rich.progress.BarColumn(), count, numbers, left, console=console, redirect_stdout=False
    )


def _clock_face(seconds: float | None) -> str:
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _plain(value: Any) -> Any:
    """`value` with Python numbers and lists in place of NumPy and JAX arrays."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _encode(record: Mapping[str, Any]) -> str:
    """One line of JSON, non-finite numbers moved to `nonfinite`."""
    if NONFINITE in record:
        raise ValueError(f"metrics have the key {NONFINITE!r}, which is reserved; expected another name")
    found: list[list[Any]] = []
    clean = {key: _without_nonfinite(value, [key], found) for key, value in record.items()}
    if found:
        clean[NONFINITE] = found
    return json.dumps(clean, allow_nan=False)


def _without_nonfinite(value: Any, path: list[Any], found: list[list[Any]]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        found.append([*path, str(value)])
        return None
    if isinstance(value, list):
        return [_without_nonfinite(item, [*path, i], found) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: _without_nonfinite(item, [*path, key], found) for key, item in value.items()}
    return value


def _restore(record: dict[str, Any]) -> dict[str, Any]:
    """Puts the numbers named in `nonfinite` back in their places."""
    for *parents, last, text in record.pop(NONFINITE, []):
        place = record
        for key in parents:
            place = place[key]
        place[last] = float(text)
    return record


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line without its newline, and its record; stops before a torn last line."""
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise ConfigError(f"{path}, line {number} is {line[:80]!r}; expected a JSON object") from error
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ConfigError(f"{path}, line {number} is {line[:80]!r}; expected a JSON object with a whole `step`")
        yield line, record


def _truncate(path: Path, step: int) -> dict[str, Any] | None:
    """Removes a torn last line and the lines after `step`; returns the last record kept, or None."""
    if not path.exists():
        return None
    kept = [(line, record) for line, record in _lines(path) if record["step"] <= step]
    write_atomically(path, b"".join(line + b"\n" for line, _ in kept))
    return _restore(kept[-1][1]) if kept else None


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What TensorBoard draws: numbers, lists of numbers, and the load of each MoE layer's fullest expert over even."""
    for key, value in record.items():
        if key == "expert_load":
            for layer, load in enumerate(value or []):
                yield f"expert_load_max_over_even/{layer:03d}", max(load) * len(load) / max(sum(load), 1)
        elif key != "step":
            parts = {f"{key}/{i}": part for i, part in enumerate(value)} if isinstance(value, list) else {key: value}
            yield from ((tag, part) for tag, part in parts.items() if isinstance(part, int | float))
