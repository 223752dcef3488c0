"""A server of environments from its start to its end."""

import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

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


def run(app: Starlette, bound: socket.socket, ready: Callable[[str, int], None]) -> int:
    """Serves on a bound socket until SIGTERM or Ctrl-C. ready: called with the host and port once it listens. Returns
    the exit status: 0, or 130 after Ctrl-C."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5, server_header=False)
    server = _Server(config)
    server.ready = ready
    server.run(sockets=[bound])
    return INTERRUPTED if server.by == signal.SIGINT else 0
