"""Rollouts by a server: `orogen serve --weights FOLDER --api_key KEY`, perhaps on other devices or another host.

Trainer and server both see FOLDER. The trainer writes each version of the weights there as a checkpoint folder, keeps
the last ones, and removes them when the run ends; those of a run that is killed stay. Prompts and answers are token
ids, so nothing is tokenised twice. Seeds are those of rollouts in one process, and answers are too where the server's
engine has the same settings: to the bit with one slot, else up to rounding, since which requests the server reads
together depends on when they arrive.
"""

import base64
import http.client
import json
import os
import secrets
import shutil
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from orogen.checkpoint.written import write_folder
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.rl import RLConfig
from orogen.data.tokenizer import Tokenizer
from orogen.infer.request import ERROR, LENGTH, STOP, Chosen, Output, Request
from orogen.infer.text import Texts

API_KEY = "OROGEN_API_KEY"  # of the environment, as for the server
SECONDS = 600.0  # for one answer
LOOK = 0.1  # seconds between two looks at whether there are other weights
KEPT = 2  # versions of weights that stay on disk, as the server may still read the one before


class ServerError(OSError):
    """The server cannot be reached, or fails."""


class RemoteEngine:
    """What a server writes. Raises ConfigError for a URL or folder that cannot be, or without a key."""

    def __init__(self, rl: RLConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        assert rl.server is not None and rl.server_weights is not None
        self._url = urllib.parse.urlsplit(rl.server)
        if self._url.scheme != "http" or not self._url.hostname:
            raise ConfigError(f"RLConfig.server is {rl.server!r}; expected http://HOST:PORT of an `orogen serve`")
        self._key = os.environ.get(API_KEY)
        if not self._key:
            raise ConfigError(f"RLConfig.server is set and {API_KEY} is not; expected the key of the server")
        self._folder, self._model = Path(rl.server_weights), model
        if not self._folder.is_dir():
            raise ConfigError(f"RLConfig.server_weights is {rl.server_weights!r}; expected a folder that exists")
        self._texts, self._ends, self._most = Texts(tokenizer), tokenizer.end_ids, rl.slots
        self._more = {"return_routed_experts": True} if rl.router_replay else {}
        # Not of the process's id, which another container on the same folder may have, or this one's next run.
        self._name, self._pushed = f"weights-{secrets.token_hex(8)}", 0

    def give(self, params: nnx.State, buffers: nnx.State, *, version: int, in_flight: bool) -> None:
        """Has the server answer by these weights of the whole model from now on. Raises ServerError, and ConfigError
        for what it refuses."""
        self._pushed += 1
        name = f"{self._name}-{self._pushed}"
        write_folder(self._folder / name, self._model, params, buffers)
        self._post("/v1/weights", {"folder": name, "version": version, "in_flight": in_flight})
        shutil.rmtree(self._folder / f"{self._name}-{self._pushed - KEPT}", ignore_errors=True)

    def close(self) -> None:
        """Removes the weights of this run, which the server holds in memory, from the folder."""
        for one in self._folder.glob(f"{self._name}-*"):
            shutil.rmtree(one, ignore_errors=True)

    def run(self, requests: Iterable[Request], progress: Callable[[], None]) -> list[list[Output]]:
        """The outputs of each request, at most `RLConfig.slots` at a time. Raises as `give`."""
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
                raise
            return [one.result() for one in asked]

    def _answer(self, number: int, request: Request) -> list[Output]:
        body = {
            "prompt": list(request.prompt), "max_tokens": request.max_tokens, "seed": request.sampling.seed,
            "temperature": request.sampling.temperature, "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        (choice,) = self._post("/v1/completions", body | self._more)["choices"]
        ids, scores = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        chosen = list(map(Chosen, ids, scores))
        if choice["finish_reason"] not in (STOP, LENGTH):
            return [Output(number, tuple(chosen), finish=ERROR, error=f"the server: {choice['finish_reason']}")]
        text = self._text(request, ids)
        versions = choice["token_versions"]
        parts = [Output(number, (one,), version=version) for one, version in zip(chosen, versions, strict=True)]
        experts = self._experts(choice) if self._more else None
        return [*parts, Output(number, text=text, finish=choice["finish_reason"], experts=experts)]

    def _experts(self, choice: dict[str, Any]) -> np.ndarray:
        """(n, l, k) int16, of the tokens that the server's model read."""
        told = choice["routed_experts"]
        if told is None:
            raise ConfigError(f"RLConfig.server {self._url.geturl()} tells no experts; expected router_replay False, "
                              "or a server with EngineConfig.report_experts = True")  # fmt: skip
        return np.frombuffer(base64.b64decode(told["int16"]), "<i2").reshape(told["shape"])

    def _text(self, request: Request, ids: Sequence[int]) -> str:
        """As the engine tells it: an end token adds none."""
        stream = self._texts.stream(after=request.prompt, shown=request.shown)
        said = ids[:-1] if ids and ids[-1] in self._ends else ids
        return stream.push(list(said)) + stream.finish()

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self._url.hostname or "", self._url.port, timeout=SECONDS)
        headers = {"content-type": "application/json", "authorization": f"Bearer {self._key}"}
        try:
            connection.request("POST", self._url.path.rstrip("/") + path, json.dumps(body), headers)
            response = connection.getresponse()
            found = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(f"RLConfig.server {self._url.geturl()}{path}: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            reason = found.get("error", {}).get("message") if isinstance(found, dict) else found
            refused = response.status < http.HTTPStatus.INTERNAL_SERVER_ERROR
            kind = ConfigError if refused and response.status != http.HTTPStatus.TOO_MANY_REQUESTS else ServerError
            raise kind(f"RLConfig.server {self._url.geturl()} answers {path} with {response.status}: {reason}")
        return found
