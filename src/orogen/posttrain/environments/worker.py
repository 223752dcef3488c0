"""A process that verifies: `python -m orogen.posttrain.environments.worker` with the environment's config on stdin.

It imports no jax. Messages are 8 bytes of length, then JSON. The first one is the config, which is answered when the
environment is ready; each further one has `number` of the task, `state` and `said`, and its answer `state`, `replies`,
`rewards` and `left_out`, or `error` with what was raised, and its `kind` if that is known. What the environment prints
goes nowhere.
"""

import dataclasses
import json
import os
import resource
import struct
import sys
import threading
import time
from typing import Any, BinaryIO

from orogen.config.checks import shown
from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.interface import MOST_REWARD, FaultError, Said
from orogen.posttrain.environments.make import make_environment

LENGTH = struct.Struct(">Q")


def read(stream: BinaryIO) -> Any:
    """The next message, None at the end."""
    head = stream.read(LENGTH.size)
    return json.loads(stream.read(LENGTH.unpack(head)[0])) if len(head) == LENGTH.size else None


def written(message: Any) -> bytes:
    """A message as it goes through the pipe."""
    data = json.dumps(message).encode()
    return LENGTH.pack(len(data)) + data


def main() -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what a verifier prints is no answer
    config = EnvironmentConfig(**read(sys.stdin.buffer))
    memory = config.memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    environment = make_environment(config)
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())  # errors of the start alone are read
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers.write(written({"ready": True}))
    answers.flush()
    while (request := read(sys.stdin.buffer)) is not None:
        answers.write(written(_answered(environment, request)))
        answers.flush()


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, whatever the verifier does."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _answered(environment: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        example = environment.example(request["number"])
        turn = environment.step(example, request["state"], Said(**request["said"]))
    except FaultError as error:
        return {"error": " ".join(str(error).split()), "kind": error.kind}
    except Exception as error:  # a verifier may raise anything: it is told to whoever asked
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    rewards = turn.rewards and {name: float(value) for name, value in turn.rewards.items()}
    if rewards and not all(abs(value) <= MOST_REWARD for value in rewards.values()):  # nor is NaN
        expected = f"expected finite numbers of at most {MOST_REWARD:g} in size"
        return {"error": f"a reward is {shown(rewards)}; {expected}", "kind": "nan"}
    return {"state": turn.state, "replies": list(turn.replies), "rewards": rewards, "left_out": turn.left_out}


def config_message(config: EnvironmentConfig) -> dict[str, Any]:
    """The first message."""
    return dataclasses.asdict(config)


if __name__ == "__main__":
    main()
