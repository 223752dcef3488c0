"""Tasks whose tools and verifier are a resources server of NeMo Gym (https://github.com/NVIDIA-NeMo/Gym), over HTTP.

A task is a line of a Gym data set: {"responses_create_params": {"input": …, "tools": …}, …}, with whatever else its
server wants. An episode posts the whole line to /seed_session, the arguments of each call to /NAME, and at its end the
line with a `response`, all that was said and answered, to /verify, which says the reward. The session is in cookies.

The server is not trusted: one that is not there, is late, breaks off, floods or answers what the contract does not say
is a fault, which is counted. The model chooses which tool is called, but only among the task's: /verify is none.
"""

import copy
import http.client
import json
import math
import socket
import time
import urllib.parse
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.json_file import ListOf, Record, parse_json
from orogen.config.rl import EnvironmentConfig
from orogen.infer.items import ITEM, TOOL, chat_tool, messages_of, said_items
from orogen.infer.messages import check_messages
from orogen.posttrain.environments.files import lines_of
from orogen.posttrain.environments.interface import (
    CRASH,
    FLOOD,
    MOST_PARTS,
    RAISED,
    TIMEOUT,
    Example,
    FaultError,
    Said,
    Turn,
)

ASKED = "responses_create_params"
PARAMS = Record({"input": (str, ListOf(ITEM))}, {"instructions": (str, None), "tools": (ListOf(TOOL), None)})
_TASK = Record({ASKED: PARAMS})
MOST_OUTPUT = 2**18  # bytes of what a tool answers
MOST_VERDICT = 2**24  # bytes of what the verifier answers, which repeats the whole episode
MOST_NAME = 100  # characters of a part of a reward
EARLIER = 0.9  # of the deadline, after which the process that verifies would be ended


class NemoGym:
    """The tasks of a file. Raises ConfigError for a malformed one."""

    def __init__(self, config: EnvironmentConfig) -> None:
        assert config.corpus is not None and config.url is not None
        self._config = config
        self._rows = lines_of(Path(config.corpus), _TASK)
        self._examples = [_example(row, n, f"{config.corpus}: task {n + 1}") for n, row in enumerate(self._rows)]

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, number: int) -> Example:
        """Task `number`."""
        return self._examples[number]

    def start(self, example: Example) -> Any:
        """No session, which the first turn begins."""
        return {"cookies": None, "items": [], "turns": 0}

    def step(self, example: Example, state: Any, said: Said) -> Turn:
        """Carries out the calls of a turn; a turn without any, or the last one, is verified. Raises FaultError."""
        row, state = self._rows[example.secret["number"]], copy.deepcopy(state)
        server = _Server(str(self._config.url), EARLIER * self._config.seconds, state["cookies"] or {})
        if state["cookies"] is None:
            server.required("seed_session", row)
        number = state["turns"] = state["turns"] + 1
        calls = [(f"call_{number}_{n}", name, arguments) for n, (name, arguments) in enumerate(said.calls)]
        state["items"] += said_items(said.content, said.reasoning, calls)
        known, replies = {tool["function"]["name"] for tool in example.tools}, []
        for call_id, name, arguments in calls:
            output = server.tool(name, arguments) if name in known else json.dumps({"error": f"no tool {name!r}"})
            state["items"].append({"type": "function_call_output", "call_id": call_id, "output": output})
            replies.append({"role": "tool", "content": output, "tool_call_id": call_id})
        state["cookies"] = server.cookies
        if replies and number < self._config.turns:
            return Turn(state, replies=replies)
        verdict = server.required("verify", row | {"response": _response(row, state["items"])})
        rewards, left_out = _rewards(verdict)
        return Turn(None, rewards=rewards, left_out=left_out)


def _example(row: dict[str, Any], number: int, where: str) -> Example:
    params = row[ASKED]
    try:
        given = list(messages_of({name: value for name, value in params.items() if value is not None}))
        messages = check_messages(given)
        tools = [chat_tool(tool, f"tools[{n}]") for n, tool in enumerate(params.get("tools") or ())]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return Example(key=str(number), messages=messages, tools=tools, secret={"number": number, "row": row})


def _response(row: dict[str, Any], items: list[dict[str, Any]]) -> dict[str, Any]:
    """A response of OpenAI's Responses with these items."""
    return {
        "id": "resp", "object": "response", "created_at": 0, "model": "orogen", "status": "completed", "output": items,
        "tools": row[ASKED].get("tools") or [], "tool_choice": "auto", "parallel_tool_calls": True,
    }  # fmt: skip


def _rewards(verdict: dict[str, Any]) -> tuple[dict[str, float], int]:
    """The reward, by the names of its parts if they add up to it; and how many parts it has that are not named. Raises
    FaultError."""
    if verdict.get("mask_sample") is True:
        why = verdict.get("failure_reason") or verdict.get("failure_kind") or "no reason"
        raise FaultError(RAISED, f"the server says that its reward measures nothing: {why}")
    reward, parts = verdict.get("reward"), verdict.get("reward_components")
    if not isinstance(reward, int | float) or isinstance(reward, bool):
        raise FaultError(RAISED, f"the server's reward is {reward!r}; expected a number")
    known = _numbers(parts)
    if known and math.isclose(math.fsum(known.values()), reward, rel_tol=1e-6, abs_tol=1e-6):
        return known, 0
    return {"reward": float(reward)}, len(parts) if isinstance(parts, dict) else 0


def _numbers(parts: Any) -> dict[str, float]:
    """The parts of a reward, each of which becomes a metric of every step; empty if a value is not a number, if there
    are more than MOST_PARTS, or if a name is not short and printable."""
    if not isinstance(parts, dict) or len(parts) > MOST_PARTS:
        return {}
    plain = all(0 < len(name) <= MOST_NAME and name.isprintable() for name in parts)
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in parts.values())
    return {name: float(value) for name, value in parts.items()} if plain and numbers else {}


class _Server:
    """A resources server within one turn. cookies: of the session, which each answer may change."""

    def __init__(self, url: str, seconds: float, cookies: dict[str, str]) -> None:
        self._parts, self._seconds = urllib.parse.urlsplit(url), seconds
        self._deadline = time.monotonic() + seconds
        self.cookies = dict(cookies)

    def required(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The object that it answers. Raises FaultError for everything else."""
        status, data = self._post(path, body, MOST_VERDICT)
        if status >= 300:
            text = " ".join(data[:200].decode(errors="replace").split())
            raise FaultError(CRASH if status >= 500 else RAISED, f"/{path} answers status {status}: {text}")
        try:
            found = parse_json(data, where=f"/{path}")
        except ConfigError as error:
            raise FaultError(RAISED, str(error)) from None
        if not isinstance(found, dict):
            raise FaultError(RAISED, f"/{path} answers {type(found).__name__}; expected a JSON object")
        return found

    def tool(self, name: str, arguments: Any) -> str:
        """What a tool answers, errors too, as the model reads it. Raises FaultError for no answer."""
        _, data = self._post(urllib.parse.quote(name, safe=""), arguments, MOST_OUTPUT)
        return data.decode(errors="replace")

    def _post(self, path: str, body: Any, most: int) -> tuple[int, bytes]:
        headers = {"content-type": "application/json", "connection": "close"}
        if self.cookies:
            headers["cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(str(self._parts.hostname), self._parts.port)
        try:
            connection.timeout = self._left()
            connection.request("POST", f"{self._parts.path.rstrip('/')}/{path}", json.dumps(body), headers)
            stream = connection.sock  # which the connection forgets, for it is closed after the answer
            answer = connection.getresponse()
            self._take_cookies(answer)
            return answer.status, self._read(stream, answer, most, path)
        except TimeoutError:
            raise FaultError(TIMEOUT, f"/{path} has not answered within {self._seconds:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise FaultError(CRASH, f"/{path}: {type(error).__name__} {error}") from None
        finally:
            connection.close()

    def _read(self, stream: socket.socket, answer: http.client.HTTPResponse, most: int, path: str) -> bytes:
        """The body, within a size and the deadline of the whole turn, however slowly it comes."""
        parts, size = [], 0
        while part := answer.read1(2**16):
            parts.append(part)
            size += len(part)
            if size > most:
                raise FaultError(FLOOD, f"/{path} answers more than {most} bytes")
            stream.settimeout(self._left())
        if answer.length:
            raise http.client.IncompleteRead(b"", answer.length)
        return b"".join(parts)

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _take_cookies(self, answer: http.client.HTTPResponse) -> None:
        for header in answer.headers.get_all("set-cookie") or ():
            try:
                found = SimpleCookie(header)
            except CookieError as error:
                raise FaultError(RAISED, f"a cookie of the server: {error}") from None
            self.cookies |= {name: one.value for name, one in found.items()}
