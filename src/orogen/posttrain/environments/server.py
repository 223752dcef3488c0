"""Environments as a resources server of NeMo Gym: /seed_session, one route per tool, /verify, /aggregate_metrics.

A body of /seed_session and /verify is a line that `task_rows` writes, whose `environment` and `number` name the task;
a session is a cookie. Each call of a tool is a turn of the episode, so that calls which the model makes at once count
as several against `EnvironmentConfig.turns`. /verify without a session carries out the response's calls first.

What verifies runs in processes of their own (`pool.py`). Where one crashes, hangs or floods, the answer is a reward of
0 with `mask_sample`, which Gym leaves out of its scores, and `failure_kind` orogen:KIND; /health counts them, and names
the environments whose last verifications all had no answer. Those are still tried.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import math
import secrets
import statistics
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import ListOf, Number, Record, Whole, check_form, read_object
from orogen.infer.items import ITEM, messages_of
from orogen.posttrain.environments.gym import ASKED
from orogen.posttrain.environments.interface import Environment, Said, Turn
from orogen.posttrain.environments.pool import Asked, Fault, Pool

COOKIE = "orogen_session"
MOST_SESSIONS = 4096  # the oldest end first: agents that break off end none
MOST_BODY = 2**24
TASK_INDEX = "_ng_task_index"  # Gym's name
_ROW = Record({"environment": str, "number": Whole()})
_VERIFIED = Record({"response": Record({"output": ListOf(ITEM)})})
_RESULTS = Record({"verify_responses": ListOf(Record({"reward": Number()}))})


class RefusedError(Exception):
    """A body that is refused, with an HTTP status."""

    def __init__(self, status: int, message: object) -> None:
        super().__init__(" ".join(str(message).split()))
        self.status = status


@dataclasses.dataclass
class _Session:
    environment: str
    number: int
    state: Any
    ended: Turn | Fault | None = None
    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)  # one turn after another


def task_rows(environments: Mapping[str, Environment]) -> Iterator[dict[str, Any]]:
    """The tasks as lines of a Gym data set."""
    for name, environment in environments.items():
        for number in range(len(environment)):
            example = environment.example(number)
            tools = [{"type": "function", **tool["function"], "strict": False} for tool in example.tools]
            asked = {"input": list(example.messages), "tools": tools}
            yield {ASKED: asked, "environment": name, "number": number, "key": example.key}


class GymServer:
    """The sessions and verifiers of environments. pools: by the environments' names; they never give up, and end with
    the application."""

    def __init__(self, environments: Mapping[str, Environment], pools: Mapping[str, Pool]) -> None:
        self._environments, self._pools = environments, pools
        self._sessions: collections.OrderedDict[str, _Session] = collections.OrderedDict()

    def app(self) -> Starlette:
        """The application."""

        @contextlib.asynccontextmanager
        async def life(_: Starlette) -> AsyncIterator[None]:
            yield
            for pool in self._pools.values():
                pool.close()

        posted = {"/seed_session": self._seed, "/verify": self._verify, "/aggregate_metrics": _aggregate}
        routes = [Route(path, run, methods=["POST"]) for path, run in posted.items()]
        routes += [Route("/health", self._health), Route("/{tool}", self._tool, methods=["POST"])]
        return Starlette(routes=routes, lifespan=life, exception_handlers={RefusedError: _refused})

    async def _seed(self, request: Request) -> Response:
        """Begins the episode of a task; a client's session that was open ends."""
        session = self._begun(await _body(request, _ROW))
        self._sessions.pop(request.cookies.get(COOKIE, ""), None)
        key = secrets.token_urlsafe(24)
        self._sessions[key] = session
        while len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        answer = JSONResponse({})
        answer.set_cookie(COOKIE, key, httponly=True, samesite="lax")
        return answer

    def _begun(self, row: Mapping[str, Any]) -> _Session:
        name, number = row["environment"], row["number"]
        environment = self._environments.get(name)
        if environment is None:
            expected = ", ".join(self._environments)
            raise RefusedError(422, f"environment is {shown(name)}; expected one of {expected}")
        if number >= len(environment):
            raise RefusedError(422, f"number is {number}; expected less than {len(environment)}, the tasks of {name}")
        return _Session(name, number, environment.start(environment.example(number)))

    async def _tool(self, request: Request) -> Response:
        """What a call comes to, as the environment would tell the model."""
        arguments = await _body(request, Record({}))
        session = self._sessions.get(request.cookies.get(COOKIE, ""))
        if session is None:
            raise RefusedError(400, "the request has no session; expected /seed_session first")
        output = await self._called(session, request.path_params["tool"], arguments)
        return Response(output, media_type="application/json")

    async def _called(self, session: _Session, name: str, arguments: Mapping[str, Any]) -> str:
        async with session.lock:
            if session.ended is None:
                found = await self._step(session, Said("", calls=((name, arguments),)))
                if not isinstance(found, Fault) and found.rewards is None:
                    session.state = found.state
                    return str(found.replies[0]["content"])
                session.ended = found
        return json.dumps({"error": "the episode is over"})

    async def _step(self, session: _Session, said: Said) -> Turn | Fault:
        asked = Asked(session.number, session.state, said)
        return (await run_in_threadpool(self._pools[session.environment].verify, [asked]))[0]

    async def _verify(self, request: Request) -> Response:
        """The reward of an episode, whose session ends."""
        body = await _body(request, Record({**_ROW.required, **_VERIFIED.required}))
        session = self._sessions.pop(request.cookies.get(COOKIE, ""), None)
        try:
            said = list(messages_of({"input": body["response"]["output"]})) if body["response"]["output"] else []
        except ConfigError as error:
            raise RefusedError(422, error) from None
        if session is None:
            session = self._begun(body)
            for name, arguments in _calls(said):
                await self._called(session, name, arguments)
        elif (session.environment, session.number) != (body["environment"], body["number"]):
            raise RefusedError(422, f"the session is of {session.environment} {session.number}; expected its own task")
        async with session.lock:
            found = session.ended or await self._step(session, _last(said))
        return _answered(body | _verdict(found))

    async def _health(self, request: Request) -> Response:
        faults = {name: dict(pool.faults) for name, pool in self._pools.items()}
        broken = [name for name, pool in self._pools.items() if pool.broken]
        return JSONResponse({"status": "ok", "sessions": len(self._sessions), "faults": faults, "broken": broken})


def _answered(found: Any) -> Response:
    try:
        return JSONResponse(found)
    except ValueError:
        raise RefusedError(422, "the body holds NaN or Infinity; expected JSON without them") from None


def _last(said: Sequence[Mapping[str, Any]]) -> Said:
    """The turn that ends an episode: what the model said last, if it said anything after its calls."""
    last = said[-1] if said and said[-1]["role"] == "assistant" and not said[-1].get("tool_calls") else {}
    content = str(last.get("content") or "")
    return Said(content, content, str(last.get("reasoning_content") or ""))


def _calls(said: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for message in said:
        for call in message.get("tool_calls") or ():
            function = call["function"]
            try:
                arguments = read_object(function["arguments"].encode(), where=f"the arguments of {function['name']}")
            except ConfigError as error:
                raise RefusedError(422, error) from None
            yield function["name"], arguments


def _verdict(found: Turn | Fault) -> dict[str, Any]:
    if isinstance(found, Fault):
        why = {"failure_kind": f"orogen:{found.kind}", "failure_reason": found.reason}
        return {"reward": 0.0, "reward_components": {}, "mask_sample": True, **why}
    if found.rewards is None:
        why = {"failure_kind": "orogen:unfinished", "failure_reason": "the episode goes on"}
        return {"reward": 0.0, "reward_components": {}, "mask_sample": True, **why}
    rewards = dict(found.rewards)
    return {"reward": math.fsum(rewards.values()), "reward_components": rewards, "mask_sample": False}


async def _aggregate(request: Request) -> Response:
    """Gym's statistics of every number in results, over all of them and by task; masked ones are left out."""
    body = await _body(request, _RESULTS)
    kept = [one for one in body["verify_responses"] if one.get("mask_sample") is not True]
    by_task: dict[Any, list[dict[str, Any]]] = {}
    for one in kept:
        by_task.setdefault(json.dumps(one.get(TASK_INDEX)), []).append(one)
    tasks = [{TASK_INDEX: json.loads(task), **_described(some)} for task, some in by_task.items()]
    whole = _described(kept)
    key = {name: whole[name] for name in ("mean/reward",) if name in whole}
    return _answered({"group_level_metrics": tasks, "agent_metrics": whole, "key_metrics": key})


def _described(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    numbers: dict[str, list[float]] = {}
    for one in results:
        for name, value in one.items():
            known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if known and not name.startswith("_"):
                numbers.setdefault(name, []).append(float(value))
    measures = {"mean": statistics.fmean, "max": max, "min": min, "median": statistics.median}
    return {f"{by}/{name}": run(found) for name, found in numbers.items() for by, run in measures.items()}


async def _body(request: Request, form: Record) -> dict[str, Any]:
    """The object of a body. Raises RefusedError."""
    data = bytearray()
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > MOST_BODY:
                raise RefusedError(413, f"the body has more than {MOST_BODY} bytes; expected at most that")
    except ClientDisconnect:
        raise RefusedError(400, "the client left within the body") from None
    try:
        found = read_object(bytes(data), where="the body")
        check_form(found, form, where="the body")
    except ConfigError as error:
        raise RefusedError(422, error) from None
    return found


async def _refused(_: Request, error: Exception) -> Response:
    """The response to a RefusedError, in the form of FastAPI, which Gym's own servers have."""
    assert isinstance(error, RefusedError)
    return JSONResponse({"detail": str(error)}, status_code=error.status)
