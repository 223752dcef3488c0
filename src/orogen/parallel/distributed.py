"""Many processes on JAX's multi-controller runtime: how they start, what they agree on, and how one leaves.

Every process runs the same program. Only the first one (number 0) writes files that describe the run; it passes its
decisions to the others through the runtime's key-value store. In a run of one process, all of these functions are the
identity. Importing this module does not import jax.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orogen.config.checks import ConfigError
from orogen.parallel.cluster import Cluster
from orogen.parallel.roll_call import call_roll

START_SECONDS = 40.0  # of waiting for all processes, unless the environment has another number; imports come first
START_VARIABLE = "OROGEN_START_SECONDS"
# A process that sends no heartbeat for this long counts as dead, and the runtime ends the others.
HEARTBEAT_SECONDS = 40
# Of waiting, when a process is done, for others that are not.
SHUTDOWN_SECONDS = 60
POLL_MILLISECONDS = 500  # between looks at signals while this process waits for another
LAST_SECONDS = 1.0

_processes: list[Cluster] = []  # this one, once it has started as one of several
_numbers = itertools.count()  # of what is agreed on, in the order of the program, which is the same on all processes


def start(cluster: Cluster | None) -> None:
    """Joins the other processes of `cluster`. Call it before jax makes its devices. Raises AbsentError if one of them
    does not start in time, and ConfigError; see `call_roll`."""
    if cluster is None or cluster.count == 1:
        return
    call_roll(cluster, _seconds())
    import jax

    # Its handler of SIGTERM would replace the run's own.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _keep_stdout_to_python()
    jax.distributed.initialize(
        cluster.coordinator,
        num_processes=cluster.count,
        process_id=cluster.index,
        local_device_ids=cluster.accelerator,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    from orogen.parallel.rank_order import sum_in_rank_order

    sum_in_rank_order()
    _processes.append(cluster)


def count() -> int:
    """The number of processes of this run."""
    return _processes[0].count if _processes else 1


def index() -> int:
    """The number of this process, from 0."""
    return _processes[0].index if _processes else 0


def first() -> bool:
    """Whether this process is the one that writes for all."""
    return index() == 0


def from_first(work: Callable[[], Any]) -> Any:
    """`work()`, which only the first process calls; all processes return its value, plain JSON. If it raises, all of
    them raise: ConfigError and OSError as such, any other exception as RuntimeError on the other processes."""
    if count() == 1:
        return work()
    key = f"orogen/first/{next(_numbers)}"
    if not first():
        answer = json.loads(_wait(key))
        if "error" in answer:
            raise _raised(**answer)
        return answer["value"]
    try:
        value = work()
        answer = json.dumps({"value": value})
    except BaseException as error:  # whatever it is, the others wait for it
        _client().key_value_set(key, json.dumps(_described(error)))
        raise
    _client().key_value_set(key, answer)
    return value


def _described(error: BaseException) -> dict[str, Any]:
    """The arguments of `_raised`, by name. number: errno of an OSError."""
    if isinstance(error, ConfigError):
        return {"error": ConfigError.__name__, "message": str(error), "number": None}
    if isinstance(error, OSError):
        message = error.strerror if error.errno is not None and error.strerror else str(error)
        if error.errno is not None and error.filename is not None:
            message = f"{message}: {str(error.filename)!r}"
        return {"error": OSError.__name__, "message": message, "number": error.errno}
    return {"error": type(error).__name__, "message": str(error), "number": None}


def _raised(error: str, message: str, number: int | None) -> Exception:
    """The exception of the first process, as the others raise it. error: the name of its type."""
    if error == ConfigError.__name__:
        return ConfigError(message)
    if error == OSError.__name__:
        return OSError(message) if number is None else OSError(number, message)
    return RuntimeError(f"process 0 failed with {error}: {message}")


def from_all(value: Any) -> list[Any]:
    """Every process's `value`, plain JSON, in the order of the processes. Returns once all have called it."""
    if count() == 1:
        return [value]
    key = f"orogen/all/{next(_numbers)}"
    _client().key_value_set(f"{key}/{index()}", json.dumps(value))
    return [json.loads(_wait(f"{key}/{number}")) for number in range(count())]


def propose(name: str, value: int) -> None:
    """Settles the value of `name`, unless a process has done so before. Does nothing in a run of one process."""
    if count() == 1:
        return
    import jax

    try:
        _client().key_value_set(f"orogen/settled/{name}", str(value))
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def settled(name: str) -> int | None:
    """The value of `name`, None if no process has settled it. Sees every proposal that was made before this call."""
    import jax

    try:
        return int(_client().key_value_try_get(f"orogen/settled/{name}"))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return None


def meet(name: str, seconds: float, interrupted: Callable[[], bool]) -> bool:
    """Waits until all processes have called this with `name`, which can be used once, and returns True; returns False
    as soon as `interrupted()` is true. Raises TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    _client().key_value_set(f"orogen/met/{name}/{index()}", "")
    for number in range(count()):
        while _soon(f"orogen/met/{name}/{number}") is None:
            if interrupted():
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {number} did not come to {name} within {seconds:.0f} s")
    return True


def wait_until_settled(name: str) -> int:
    """The value of `name`, once a process has settled it."""
    return int(_wait(f"orogen/settled/{name}"))


def fresh_name(what: str) -> str:
    """A name that this process has not used, and that is the same on all of them if they all call this in the same
    order."""
    return f"{what}/{next(_numbers)}"


def compiled_together(function: Any) -> Callable[..., Any]:
    """A jitted function of arrays, which no process runs before all have compiled it for their shapes: gloo gives up on
    ranks that are more than 30 seconds late, and one process may find the program in its cache."""
    if count() == 1:
        return function
    import jax

    compiled: dict[Any, Any] = {}

    def call(*arguments: Any) -> Any:
        shapes = tuple(x.shape for x in jax.tree.leaves(arguments))
        if shapes not in compiled:
            compiled[shapes] = function.lower(*arguments).compile()
            from_all(None)
        return function(*arguments)

    return call


def require_shared(path: Path, seconds: float = START_SECONDS) -> None:
    """Raises ConfigError, on all processes, if `path`, which the first one has created, is not visible to one of them
    within `seconds`: a file server may take some time."""
    deadline = time.monotonic() + seconds
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [number for number, sees in enumerate(from_all(seen)) if not sees]
    if blind:
        raise ConfigError(
            f"process {blind[0]} of {count()} does not see {path}; expected a run folder on a disk that all share"
        )


def leave(status: int) -> int:
    """Returns `status`, the exit status of this process. If it is an error and there are several processes, this one
    ends at once: a normal exit would wait for the others, which may wait for this one."""
    if count() == 1 or status == 0:
        return status
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if first():
        time.sleep(LAST_SECONDS)  # the others, if they have the same error, say so before its loss ends them
    os._exit(status)


def _seconds() -> float:
    text = os.environ.get(START_VARIABLE)
    if text is None:
        return START_SECONDS
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"{START_VARIABLE} is {text!r}; expected a number of seconds above 0")
    return float(text)


def _client() -> Any:
    from jax._src.distributed import global_state  # jax exports its key-value store to nobody

    return global_state.client


def _wait(key: str) -> str:
    while (value := _soon(key)) is None:
        pass
    return value


def _soon(key: str) -> str | None:
    """The value of the key if it has one, or gets one within a moment."""
    import jax

    try:
        return _client().blocking_key_value_get(key, POLL_MILLISECONDS)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None


def _keep_stdout_to_python() -> None:
    """Sends what libraries print to /dev/null: gloo reports each group of ranks on stdout, where an answer in JSON may
    be expected. Python's own output goes where it went."""
    sys.stdout.flush()
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)
