"""The roll call that the processes of a run answer before they start JAX's runtime.

The runtime itself waits for five minutes, then aborts a process with a stack trace that does not say which process is
missing. Here every process learns within a minute which ones are missing, or that one was started twice, or for another
number of processes.

Process 0 listens on the coordinator's port. Each other one connects and sends its number and the number of processes
that it expects. Once all are there, or when time is up, process 0 tells each what is wrong, if anything. The port is
then free for the runtime.
"""

import contextlib
import json
import os
import socket
import time
from typing import Any, NoReturn

from orogen.config.checks import ConfigError
from orogen.parallel.cluster import Cluster

RETRY_SECONDS = 0.2
# A connection that sends no line for this long is not from a process of the run.
LINE_SECONDS = 3.0
# How long a process waits for its answer beyond its own limit.
GRACE_SECONDS = 5.0
LONGEST_LINE = 4096
NAMED = 16  # missing processes in a message


class AbsentError(ConfigError):
    """Another process is missing. Unlike other mistakes, that may be different when the task is started again."""


def call_roll(cluster: Cluster, seconds: float) -> None:
    """Returns once every process has called this. Raises AbsentError on all of them if one does not within `seconds`,
    and ConfigError if two have one number, or if they expect different numbers of processes."""
    if cluster.index:
        _answer(cluster, seconds)
    else:
        _call(cluster, seconds)


def _call(cluster: Cluster, seconds: float) -> None:
    """The part of process 0."""
    deadline = time.monotonic() + seconds
    present: dict[int, socket.socket] = {}
    wrong, absent = "", False
    with contextlib.ExitStack() as held:
        server = held.enter_context(_server(cluster.coordinator))
        while len(present) < cluster.count - 1 and not wrong:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = held.enter_context(server.accept()[0])
            except TimeoutError:
                wrong, absent = _missing(cluster, present.keys(), seconds), True
                break
            connection.settimeout(LINE_SECONDS)
            said = _line(connection)
            if type(index := said.get("process")) is int and type(count := said.get("processes")) is int:
                wrong = _objection(cluster, index, count, index in present)
                if wrong:
                    _send(connection, {"wrong": wrong})
                else:
                    present[index] = connection
        for connection in present.values():
            _send(connection, {"wrong": wrong, "absent": absent})
    if wrong:
        raise AbsentError(wrong) if absent else ConfigError(wrong)


def _answer(cluster: Cluster, seconds: float) -> None:
    """The part of the others."""
    deadline = time.monotonic() + seconds
    with _connected(cluster, seconds) as connection:
        # Process 0 may have started later than this one, and has a limit of its own.
        connection.settimeout(max(deadline - time.monotonic(), 0) + GRACE_SECONDS)
        _send(connection, {"process": cluster.index, "processes": cluster.count})
        said = _line(connection)
    wrong = said.get("wrong")
    if not isinstance(wrong, str):
        _refuse(cluster, f"did not answer within {seconds + GRACE_SECONDS:g} s; expected process 0 of this run there")
    if wrong:
        raise AbsentError(wrong) if said.get("absent") else ConfigError(wrong)


def _connected(cluster: Cluster, seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    host, _, port = cluster.coordinator.rpartition(":")
    while True:
        left = deadline - time.monotonic()
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=max(left, RETRY_SECONDS))
        except OSError as error:  # not there yet, or its name is not known yet
            if left < 0:
                reason = error.strerror or error
                expected = f"expected process 0 to listen there within {seconds:g} s"
                _refuse(cluster, f"cannot be reached ({reason}); {expected}")
        time.sleep(RETRY_SECONDS)


def _server(coordinator: str) -> socket.socket:
    port = int(coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigError(f"process 0 cannot listen at {coordinator} ({reason}); expected a free port") from None


def _line(connection: socket.socket) -> dict[str, Any]:
    """The JSON object that is sent; an empty one if nothing of the kind is."""
    try:
        with connection.makefile("rb") as stream:
            said = json.loads(stream.readline(LONGEST_LINE))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _send(connection: socket.socket, what: dict[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(what).encode() + b"\n")
    except OSError:  # the other end is gone: whoever waits for it says so
        return


def _objection(cluster: Cluster, index: int, count: int, known: bool) -> str:
    if count != cluster.count:
        return f"process {index} was started for {count} processes; expected {cluster.count}, as process 0 was"
    if known or not 0 < index < count:
        return f"two processes have the number {index}; expected each of 0 to {cluster.count - 1} once"
    return ""


def _missing(cluster: Cluster, present: Any, seconds: float) -> str:
    absent = sorted(set(range(1, cluster.count)) - set(present))
    named = ", ".join(map(str, absent[:NAMED])) + (", …" if len(absent) > NAMED else "")
    return (
        f"process {named} of {cluster.count} did not start within {seconds:g} s; expected each to reach process 0 at "
        f"{cluster.coordinator}"
    )


def _refuse(cluster: Cluster, what: str) -> NoReturn:
    raise AbsentError(f"process {cluster.index} of {cluster.count}: the coordinator {cluster.coordinator} {what}")
