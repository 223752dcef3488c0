"""Rollouts by a server: `orogen serve --weights FOLDER --api_key KEY`, perhaps on other devices or another host.

Trainer and server both see FOLDER. The trainer writes each version of the weights there as a checkpoint folder, keeps
the last ones, and removes them when the run ends; those of a run that is killed stay. Prompts and answers are token
ids, so nothing is tokenised twice. Seeds are those of rollouts in one process, and answers are too where the server's
engine has the same settings: to the bit with one slot, else up to rounding, since which requests the server reads
together depends on when they arrive.

A call that is refused for now, dropped or late is sent again (`calls.py`); its answer counts once. Weights have numbers
of their own there, and each process of a server has an id, by which answers are found that a server wrote with other
weights, as one does that was started anew. It is given the weights again, and every answer that it began before is
requested again: its tokens may be of our weights and yet depend on what others cached of the prompt.
"""

import base64
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from orogen.checkpoint.written import write_folder
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.rl import RLConfig
from orogen.data.tokenizer import Tokenizer
from orogen.infer.request import ERROR, LENGTH, STOP, Chosen, Output, Request
from orogen.infer.text import Texts
from orogen.posttrain.calls import Attempt, Calls, Patience, ServerError

API_KEY = "OROGEN_API_KEY"  # of the environment, as for the server
LOOK = 0.1  # seconds between two looks at whether requests have ended, or weights may be given
KEPT = 2  # versions of weights that stay on disk, as the server may still read the one before


class _Process(NamedTuple):
    """The server's process that has our weights. instance: its id. since: the `time.monotonic` from which on what it
    begins is by our weights alone."""

    instance: str | None
    since: float


class RemoteEngine:
    """What a server writes. Raises ConfigError for a folder or key that cannot be, or without a key."""

    def __init__(self, rl: RLConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        assert rl.server is not None and rl.server_weights is not None
        self._folder, self._model = Path(rl.server_weights), model
        if not self._folder.is_dir():
            raise ConfigError(f"RLConfig.server_weights is {rl.server_weights!r}; expected a folder that exists")
        patience = Patience(rl.server_timeout, rl.server_deadline, rl.server_retries)
        self._calls = Calls("RLConfig.server", rl.server, _key(), patience)
        self._texts, self._ends, self._most = Texts(tokenizer), tokenizer.end_ids, rl.slots
        self._more = {"return_routed_experts": True} if rl.router_replay else {}
        # Not of the process's id, which another container on the same folder may have, or this one's next run.
        self._name, self._pushed = f"weights-{secrets.token_hex(8)}", 0
        # What the server calls our weights: numbers that neither its own (0) nor another run's are likely to be. The
        # newest one, and the newest that it has confirmed; and what the caller calls them.
        self._newest = self._confirmed = 1 + secrets.randbelow(2**30)
        self._version_of: dict[int, int] = {}
        self._giving = threading.Lock()  # held while weights are given
        self._given_at = 0.0
        self._process = _Process(None, 0.0)  # replaced as a whole, since it is read without the lock
        self._reported_retries = 0

    def give(
        self, params: nnx.State, buffers: nnx.State, *, version: int, in_flight: bool,
        progress: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Has the server answer by these weights of the whole model from now on. progress: called while this waits;
        what it raises ends that. Raises ServerError, and ConfigError for what the server refuses."""
        name = f"{self._name}-{self._pushed + 1}"
        write_folder(self._folder / name, self._model, params, buffers)
        while not self._giving.acquire(timeout=LOOK):
            progress()
        try:
            self._pushed += 1
            self._newest += 1
            self._version_of[self._newest] = version
            self._send_weights(in_flight=in_flight, progress=progress)
        finally:
            self._giving.release()
        shutil.rmtree(self._folder / f"{self._name}-{self._pushed - KEPT}", ignore_errors=True)

    def _send_weights(
        self, *, in_flight: bool, progress: Callable[[], None] = lambda: None, seconds: float | None = None
    ) -> None:
        """Names the newest weights to the server; `_giving` is held. seconds: as of `Calls.post`."""
        body = {"folder": f"{self._name}-{self._pushed}", "version": self._newest, "in_flight": in_flight}
        found = self._calls.post("/v1/weights", body, progress=progress, seconds=seconds)
        instance = found.get("instance")
        if not isinstance(instance, str):
            expected = "its instance, as of an `orogen serve`"
            raise ServerError(f"{self._calls} answers {str(found)[:200]}; expected {expected}")
        self._confirmed, self._given_at = self._newest, time.monotonic()
        if instance != self._process.instance:  # whatever it has begun until now is by weights of its own
            self._process = _Process(instance, self._given_at)

    def retries(self) -> int:
        """How many calls were sent again since this was asked last."""
        before, self._reported_retries = self._reported_retries, self._calls.retries
        return self._reported_retries - before

    def close(self) -> None:
        """Removes the weights of this run, which the server holds in memory, from the folder."""
        for one in self._folder.glob(f"{self._name}-*"):
            shutil.rmtree(one, ignore_errors=True)

    def run(self, requests: Iterable[Request], progress: Callable[[], None]) -> list[list[Output]]:
        """The outputs of each request, at most `RLConfig.slots` at a time. Raises as `give`."""
        try:
            with ThreadPoolExecutor(self._most) as pool:
                asked: list[Future[list[Output]]] = [pool.submit(self._answer, n, r) for n, r in enumerate(requests)]
                left = set(asked)
                try:
                    while left:
                        done, left = wait(left, timeout=LOOK, return_when=FIRST_COMPLETED)
                        for one in done:
                            one.result()  # what it raises ends the others
                        progress()
                except BaseException:
                    for one in left:
                        one.cancel()
                    self._calls.give_up()  # or those under way would be waited for, and the server may hang
                    raise
                return [one.result() for one in asked]
        finally:
            self._calls.go_on()

    def _answer(self, number: int, request: Request) -> list[Output]:
        body = {
            "prompt": list(request.prompt), "max_tokens": request.max_tokens, "seed": request.sampling.seed,
            "temperature": request.sampling.temperature, "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        oldest = self._confirmed
        check = lambda found, attempt: self._why_not_ours(found, attempt, oldest=oldest)  # noqa: E731
        found = self._calls.post("/v1/completions", body | self._more, check=check)
        choice = _choice(found)
        chosen = list(map(Chosen, choice["token_ids"], choice["logprobs"]["token_logprobs"]))
        if choice["finish_reason"] not in (STOP, LENGTH):
            return [Output(number, tuple(chosen), finish=ERROR, error=f"the server: {choice['finish_reason']}")]
        text = self._text(request, choice["token_ids"])
        known = self._version_of
        versions = [known[one] if one in known else one for one in choice["token_versions"]]
        parts = [Output(number, (one,), version=version) for one, version in zip(chosen, versions, strict=True)]
        experts = self._experts(choice) if self._more else None
        return [*parts, Output(number, text=text, finish=choice["finish_reason"], experts=experts)]

    def _why_not_ours(self, found: dict[str, Any], attempt: Attempt, *, oldest: int) -> str | None:
        """Why an answer may depend on other weights than ours, None if it cannot. The server then has ours again.
        oldest: the number of those that it had when it was first asked."""
        choice = _choice(found)
        if not self._pushed:
            return None
        process = self._process
        other = [one for one in choice["token_versions"] if not oldest <= one <= self._newest]
        if other or found["instance"] != process.instance:
            process = self._restored(attempt)
        if other:
            return f"an answer by weights {other[0]}, not this run's: the server was started anew, or was given others"
        if process is None or attempt.began < process.since or found["instance"] != process.instance:
            return "an answer that the server began before it had this run's weights again"
        return None

    def _restored(self, attempt: Attempt) -> _Process | None:
        """The server's process once it has our weights again, which it had not when it began to answer this attempt.
        None if others are giving them until the call is over."""
        if not self._giving.acquire(timeout=max(0.0, attempt.until - time.monotonic())):
            return None
        try:
            if self._given_at <= attempt.began:  # else they were given again in the meantime
                self._send_weights(in_flight=True, seconds=attempt.until - time.monotonic())
            if self._process.since <= attempt.began:  # the same process, which was given others' weights
                self._process = self._process._replace(since=self._given_at)
            return self._process
        finally:
            self._giving.release()

    def _experts(self, choice: dict[str, Any]) -> np.ndarray:
        """(n, l, k) int16, of the tokens that the server's model read."""
        told = choice["routed_experts"]
        if told is None:
            raise ConfigError(f"{self._calls} tells no experts; expected router_replay False, "
                              "or a server with EngineConfig.report_experts = True")  # fmt: skip
        return np.frombuffer(base64.b64decode(told["int16"]), "<i2").reshape(told["shape"])

    def _text(self, request: Request, ids: Sequence[int]) -> str:
        """As the engine tells it: an end token adds none."""
        stream = self._texts.stream(after=request.prompt, shown=request.shown)
        said = ids[:-1] if ids and ids[-1] in self._ends else ids
        return stream.push(list(said)) + stream.finish()


def _key() -> str:
    """The server's key. Raises ConfigError, which does not tell it."""
    key = os.environ.get(API_KEY)
    if not key:
        raise ConfigError(f"RLConfig.server is set and {API_KEY} is not; expected the key of the server")
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ConfigError(f"{API_KEY} holds characters that no key has; expected printable ASCII, no space at its ends")
    return key


def _choice(found: dict[str, Any]) -> dict[str, Any]:
    """The only choice of an answer, with what this needs of it. Raises ServerError for another server's."""
    try:
        (choice,) = found["choices"]
        counts = {len(choice["token_ids"]), len(choice["logprobs"]["token_logprobs"]), len(choice["token_versions"])}
        whole = len(counts) == 1 and "finish_reason" in choice and isinstance(found["instance"], str)
    except (KeyError, TypeError, ValueError):
        choice, whole = {}, False
    if not whole:
        expected = "ids, log-probabilities and versions of one choice's tokens, and an instance, as of `orogen serve`"
        raise ServerError(f"RLConfig.server answers {str(found)[:200]}; expected {expected}")
    return choice
