"""What an environment is. Importing this imports neither jax nor numpy: verifiers run in processes of their own."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

# What can become of a verification, beside a turn.
TIMEOUT, CRASH, FLOOD, RAISED, NAN = FAULTS = ("timeout", "crash", "flood", "raised", "nan")

# Largest magnitude: with larger ones, the sums and gradients of a batch's other samples would not be finite either.
MOST_REWARD = 1e9
MOST_PARTS = 32  # of a reward; each is a metric of every step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A task. key: names it for ever; messages: the conversation that the model continues, as OpenAI writes them; tools
    that it may call; secret: what the verifier needs and the model does not see, as plain JSON."""

    key: str
    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    secret: Any = None


class Said(NamedTuple):
    """What the model said in one turn: all of it as text, then taken apart. calls: (tool, arguments)."""

    text: str
    content: str = ""
    reasoning: str = ""
    calls: Sequence[tuple[str, Mapping[str, Any]]] = ()


class Turn(NamedTuple):
    """What comes of a turn. state: of the episode, as plain JSON; replies: messages that follow, after which the model
    goes on; rewards: by name, their sum is the reward. Either there are replies, or the episode is over with rewards.
    left_out: parts of the reward that `rewards` does not name."""

    state: Any
    replies: Sequence[dict[str, Any]] = ()
    rewards: Mapping[str, float] | None = None
    left_out: int = 0


class FaultError(RuntimeError):
    """A verification that came to nothing for a reason that the environment knows. kind: one of FAULTS."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Environment(Protocol):
    """Tasks and how answers to them are verified: pure functions of their arguments, without clocks or luck."""

    def __len__(self) -> int:
        """The number of tasks."""
        ...

    def example(self, number: int) -> Example: ...

    def start(self, example: Example) -> Any:
        """The state of an episode before its first turn, as plain JSON."""
        ...

    def step(self, example: Example, state: Any, said: Said) -> Turn: ...


def over(**rewards: float) -> Turn:
    """The end of an episode of one turn. Raises ValueError for a reward that is no finite number."""
    for name, value in rewards.items():
        if not math.isfinite(value):
            raise ValueError(f"the reward {name} is {value}; expected a finite number")
    return Turn(None, rewards=rewards)


def asked(key: str, text: str, secret: Any, *, tools: Sequence[dict[str, Any]] = (), system: str = "") -> Example:
    """An example whose conversation is one message of the user."""
    before = [{"role": "system", "content": system}] if system else []
    return Example(key=key, messages=[*before, {"role": "user", "content": text}], tools=tools, secret=secret)
