"""What `orogen environments` does: a server from its start to its end, and files of tasks."""

import contextlib
import json
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.rl import RLConfig
from orogen.config.streams import say
from orogen.infer.serve.run import listen
from orogen.posttrain.environments.interface import Environment
from orogen.posttrain.environments.make import make_environment
from orogen.posttrain.environments.pool import Pool
from orogen.posttrain.environments.server import GymServer, task_rows

INTERRUPTED = 128 + signal.SIGINT  # as a shell has it for Ctrl-C


class _Server(uvicorn.Server):
    """Ends at SIGTERM or Ctrl-C, after the requests that run, and at once at the second."""

    by: int | None = None
    ready: Callable[[str, int], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; then the server listens, which it says."""
        await super().startup(sockets)
        for bound in sockets or []:
            self.ready(*bound.getsockname()[:2])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In place of uvicorn's own, which raises the signal again at the end."""
        self.force_exit = self.by is not None
        self.by, self.should_exit = sig, True


def _made(rl: RLConfig) -> dict[str, Environment]:
    return {one.name: make_environment(one) for one in rl.environments}


def serve(rl: RLConfig, host: str, port: int, *, as_json: bool) -> int:
    """Serves the environments by NeMo Gym's contract, and says where, also on stdout `as_json`. Returns the exit status
    as `_run` does. Raises ConfigError for an address or an environment that cannot be used."""
    made = _made(rl)

    def ready(host: str, port: int) -> None:
        say(f"orogen: {', '.join(made)} on http://{f'[{host}]' if ':' in host else host}:{port}")
        if as_json:
            print(json.dumps({"host": host, "port": port, "environments": list(made)}), flush=True)

    with contextlib.ExitStack() as held:
        bound = held.enter_context(listen(host, port))
        pools = {
            one.name: held.enter_context(contextlib.closing(Pool(one, workers=rl.workers, gives_up=False)))
            for one in rl.environments
        }
        return _run(GymServer(made, pools).app(), bound, ready)


def write_tasks(rl: RLConfig, out: Path) -> int:
    """Writes the tasks as a data set of NeMo Gym, and returns their number. Raises ConfigError."""
    if not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"--out {str(out)!r}; expected a file in a folder that exists")
    rows = list(task_rows(_made(rl)))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(out, lines.encode("utf-8", "surrogatepass"))
    return len(rows)


def _run(app: Starlette, bound: socket.socket, ready: Callable[[str, int], None]) -> int:
    """Serves on a bound socket until SIGTERM or Ctrl-C. ready: called with the host and port once it listens. Returns
    the exit status: 0, or 130 after Ctrl-C."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5, server_header=False)
    server = _Server(config)
    server.ready = ready
    server.run(sockets=[bound])
    return INTERRUPTED if server.by == signal.SIGINT else 0
