"""Weights & Biases and Trackio: the metrics of a run where people look at them, beside `metrics.jsonl` and TensorBoard.

A run is in the project named after the folder that its own folder is in (WANDB_PROJECT may name another). `RUN/run_id`
has the id under which a resumed run goes on. Everything else is set as each library documents:
WANDB_MODE=offline writes to RUN/wandb alone, and `wandb sync` uploads that later; Trackio writes to TRACKIO_DIR on this
machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another place.

Steps that a resumed run takes again are sent again: Weights & Biases keeps the values that it has.
"""

import importlib.util
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically

ID_FILE = "run_id"
WAITING = 10_000  # steps that may wait to be sent
# How long the end of a run waits for them. SLURM and Kubernetes kill a process 30 s after they ask it to stop.
FINISH_SECONDS = 20.0


class Run(NamedTuple):
    """How a logger knows a run. config: its settings, shown beside its metrics."""

    folder: Path
    id: str
    config: Mapping[str, Any]

    @property
    def project(self) -> str:
        """The name of the folder that the run's is in."""
        return self.folder.absolute().parent.name or "orogen"


class Logger(Protocol):
    """What both libraries return for a run."""

    def log(self, metrics: dict[str, Any], *, step: int) -> Any:
        """Takes the numbers of one step."""
        ...

    def finish(self) -> Any:
        """Waits until everything is sent."""
        ...


def _wandb(run: Run) -> Logger:
    import wandb  # pyright: ignore[reportMissingImports] - an extra

    # Nothing on stdout, which may carry a JSON answer, and no copy of it.
    settings = wandb.Settings(silent=True, console="off")
    mode = wandb.setup(settings=settings).settings.mode
    if mode in ("online", "shared") and not wandb.login(prompt=False):
        raise RuntimeError("no API key; expected WANDB_API_KEY, `wandb login`, or WANDB_MODE=offline")
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT") or run.project, name=run.folder.name, id=run.id, resume="allow",
        dir=str(run.folder), config=dict(run.config), settings=settings,
    )  # fmt: skip


def _trackio(run: Run) -> Logger:
    import trackio  # pyright: ignore[reportMissingImports] - an extra

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trackio":  # its messages go to stdout, and no setting stops them (0.43)
            vars(module)["print"] = _silence
    # Trackio knows a run by its name alone, which runs in other folders may have as well.
    return trackio.init(
        project=run.project, name=f"{run.folder.name}-{run.id}", resume="allow",
        config=dict(run.config), auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip


def _silence(*_: Any, **__: Any) -> None:
    """Takes the place of `print`."""


OPENERS: dict[str, Callable[[Run], Logger]] = {"wandb": _wandb, "trackio": _trackio}


def require_loggers(names: tuple[str, ...]) -> None:
    """Raises ConfigError if a logger's library is not installed."""
    for name in names:
        if name in OPENERS and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"TrainConfig.loggers has {name!r}, which is not installed; expected it from `pip install "
                f"'orogen[{name}]'`"
            )


def run_id(folder: Path, *, resumed: bool) -> str:
    """The id of the run in `folder`: the one that it has, if it is resumed, or else a new one, which it then has."""
    file = folder / ID_FILE
    if resumed and file.is_file():
        return file.read_text().strip()
    new = secrets.token_hex(6)
    write_atomically(file, f"{new}\n".encode())
    return new


class Background:
    """A logger on a thread of its own, so that a slow network never delays a step and no failure stops the run.

    A failure, WAITING steps that are not sent, or FINISH_SECONDS at the end are reported once by `log`; after that the
    logger is not used any more.
    """

    def __init__(self, name: str, run: Run, log: Callable[[str], None]):
        self._name, self._run, self._log = name, run, log
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING)
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._send, name=f"logger {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends the numbers of one step, later."""
        if self._failed.is_set():
            return
        try:
            self._waiting.put_nowait((step, dict(scalars)))
        except queue.Full:
            self._fail(f"{WAITING} steps are waiting to be sent")

    def close(self) -> None:
        """Waits until everything is sent, for FINISH_SECONDS at most."""
        if self._failed.is_set():
            return
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            self._fail(f"{WAITING} steps are waiting to be sent")
            return
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._fail(f"not everything is sent after {FINISH_SECONDS:g} s")

    def _send(self) -> None:
        try:
            logger = OPENERS[self._name](self._run)
            while (item := self._waiting.get()) is not None:
                if self._failed.is_set():
                    return
                step, scalars = item
                logger.log(scalars, step=step)
            logger.finish()
        except Exception as error:  # of any kind: what people look at must not end what they look at
            self._fail(error)

    def _fail(self, reason: object) -> None:
        if not self._failed.is_set():
            self._failed.set()
            self._log(f"{self._name} gets no more metrics of this run: {' '.join(str(reason).split())}")
