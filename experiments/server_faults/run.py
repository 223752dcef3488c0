"""Faults against `orogen serve` as a process of its own: what is answered, and what is held before and after.

A tiny hybrid model of random weights, in which one token's embedding is NaN. Each line of results.jsonl is one kind of
fault with the slots, pages and snapshots held, and the resident memory of the server, once it is idle again.

    PYTHONPATH=src:. python experiments/server_faults/run.py [--bodies 10000] [--streams 200]
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from flax import nnx
from tests.infer.serve.fuzz import fault, malformed
from tests.infer.serve.harness import Reply
from tests.infer.serve.live import ids_in, post, stream

from orogen.bench.weights import export_weights
from orogen.config.model import ModelConfig
from orogen.model.lm import initial_state

HERE = Path(__file__).parent
TOKENIZER = HERE.parents[1] / "tests" / "fixtures" / "checkpoints" / "whole" / "tokenizer"
POISON = 77
MODEL = ModelConfig(
    pattern="M*-", vocab_size=259, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=16, conv_kernel=4, chunk_size=32,
)  # fmt: skip
LENGTH, TOKENS = 512, 32
# Nobody chooses the token that is NaN: only a prompt that has it reads it.
GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "logit_bias": {str(POISON): -100}}


def checkpoint(folder: Path) -> Path:
    """A Hugging Face folder of the model, with the byte tokenizer of the tests."""
    params, buffers = jax.jit(lambda: initial_state(MODEL, 0))()
    flat = dict(nnx.to_flat_state(params))
    path = ("embedding", "weight")
    flat[path] = flat[path].replace(jnp.asarray(flat[path].get_value()).at[POISON].set(jnp.nan))
    export_weights(MODEL, nnx.from_flat_state(list(flat.items())), buffers, folder)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    return folder


@contextlib.contextmanager
def serving(folder: Path, slots: int) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The port and process of a server."""
    command = [sys.executable, "-m", "orogen.cli", "serve", "--checkpoint", str(folder), "--port", "0", "--json",
               "--slots", str(slots), "--queue", str(2 * slots), "--max_length", str(LENGTH), "--drain_seconds", "20",
               "--chat_template", "nemotron_3_nano", "--name", "tiny"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["port"], process
        finally:
            if process.poll() is None:
                process.terminate()


def held(port: int, process: subprocess.Popen[str]) -> dict[str, Any]:
    """What an idle server holds. It is idle when no slot is used; that is waited for."""
    for _ in range(600):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        values = {k.removeprefix("orogen_"): float(v) for k, v in (x.rsplit(" ", 1) for x in lines if x[0] != "#")}
        if not values["slots_used"] + values["requests_waiting"] + values["requests_running"]:
            break
        time.sleep(0.1)
    names = ("slots_used", "pages_held", "snapshots_held", "requests_waiting", "requests_running")
    megabytes = psutil.Process(process.pid).memory_info().rss / 2**20
    return {**{name: int(values[name]) for name in names}, "rss_mib": round(megabytes, 1)}


async def together(port: int, bodies: list[dict[str, Any]], **given: Any) -> list[list[tuple[float, dict[str, Any]]]]:
    return await asyncio.gather(*(stream(port, body, **given) for body in bodies))


def greedy(count: int) -> list[dict[str, Any]]:
    """Bodies of prompts of 3 to 39 tokens."""
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 60) for _ in range(draw.randrange(3, 40))] for _ in range(count)]
    return [{"prompt": prompt, "max_tokens": TOKENS, **GREEDY} for prompt in prompts]


def alone(port: int, bodies: list[dict[str, Any]]) -> list[list[int]]:
    """The tokens of each body when nothing runs beside it."""
    return [ids_in(asyncio.run(stream(port, body))) for body in bodies]


def streams(port: int, bodies: list[dict[str, Any]], expected: list[list[int]]) -> dict[str, Any]:
    """Streams at once, against each by itself; and how evenly they were served."""
    began = time.monotonic()
    found = asyncio.run(together(port, bodies))
    seconds = time.monotonic() - began
    first = [events[0][0] - began for events in found]
    rates = [TOKENS / (events[-1][0] - began) for events in found]
    equal = sum(ids_in(e) == a for e, a in zip(found, expected, strict=True))
    return {
        "streams": len(bodies), "equal_to_their_own_run": equal,
        "seconds": round(seconds, 2), "tokens_per_second": round(TOKENS * len(bodies) / seconds),
        "first_token_seconds": [round(f(first), 3) for f in (min, statistics.median, max)],
        "first_token_max_over_min": round(max(first) / min(first), 2),
        "jain_index_of_rates": round(sum(rates) ** 2 / (len(bodies) * sum(rate**2 for rate in rates)), 4),
    }  # fmt: skip


def answered(port: int, path: str, data: bytes) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, data)
    response = connection.getresponse()
    headers = {key.lower(): value for key, value in response.getheaders()}
    return Reply(response.status, headers, response.read().decode())


def fuzzed(port: int, count: int) -> dict[str, Any]:
    """Malformed bodies, as `tests/infer/serve/fuzz.py` draws them."""
    statuses, faults = Counter(), []
    for number in range(count):
        path, data = malformed(random.Random(number))
        reply = answered(port, path, data)
        statuses[reply.status] += 1
        if (found := fault(reply)) is not None:
            faults.append(f"{number} {path}: {found}"[:300])
    return {"bodies": count, "statuses": dict(sorted(statuses.items())), "faults": len(faults), "first": faults[:3]}


def vanishing(port: int, count: int) -> dict[str, Any]:
    """Clients that leave after 0 to 5 events of a long stream."""
    draw = random.Random(2)

    async def use() -> None:
        body = {"max_tokens": 400, **GREEDY}
        leave = (stream(port, {**body, "prompt": [9, n % 50 + 3]}, leave_after=draw.randrange(6)) for n in range(count))
        await asyncio.gather(*leave)

    asyncio.run(use())
    return {"clients": count}


def refused(port: int) -> dict[str, Any]:
    """Requests of ten times the memory, and bodies that are no UTF-8."""
    bodies = {
        "prompt": json.dumps({"prompt": [5] * 10 * LENGTH, "max_tokens": 5}).encode(),
        "max_tokens": json.dumps({"prompt": [5], "max_tokens": 10 * LENGTH}).encode(),
        "body": b'{"prompt": "' + b"a" * 80 * 2**20 + b'"}',
        "utf-8": b'{"prompt": "\xff\xfe\xc3"}',
        "schema": json.dumps({"prompt": [5], "guided_regex": "(a{1000}){1000}"}).encode(),
    }
    found = {}
    for name, data in bodies.items():
        try:
            reply = answered(port, "/v1/completions", data)
            found[name] = [reply.status, reply.error[:100]]
        except (BrokenPipeError, ConnectionResetError):  # an answer came before the body was sent, and then an end
            found[name] = [413, "the connection was closed within the body"]
    return found


def crowded(port: int, slots: int) -> dict[str, Any]:
    """Twice as many requests as there is room for."""

    async def one(number: int) -> int:
        body = {"prompt": [number % 50 + 3], "max_tokens": 100, **GREEDY}
        reply = await asyncio.to_thread(post, port, "/v1/completions", body)
        await asyncio.to_thread(reply.read)
        return reply.status

    async def use() -> list[int]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(6 * slots))
        return await asyncio.gather(*map(one, range(6 * slots)))

    return {"statuses": dict(sorted(Counter(asyncio.run(use())).items()))}


def poisoned(port: int, room: int) -> dict[str, Any]:
    """Requests with the token whose embedding is NaN, a third as many as there are others."""
    sound = [{"prompt": [9, n + 3, 12], "max_tokens": 24, **GREEDY} for n in range(min(30, room * 3 // 4))]
    bad = [{**body, "prompt": [9, POISON, n + 3]} for n, body in enumerate(sound[: len(sound) // 3])]
    alone = [ids_in(asyncio.run(stream(port, body))) for body in sound]
    found = asyncio.run(together(port, [*sound, *bad]))
    messages = Counter(events[-1][1]["error"]["message"] for events in found[len(sound) :])
    equal = sum(ids_in(e) == a for e, a in zip(found, alone, strict=False))
    return {"sound": len(sound), "equal_to_their_own_run": equal, "poisoned": dict(messages)}


def terminated(port: int, process: subprocess.Popen[str], count: int) -> dict[str, Any]:
    """SIGTERM while streams run."""
    children = psutil.Process(process.pid).children(recursive=True)

    async def use() -> tuple[list[Any], int | str]:
        bodies = [{"prompt": [9, n % 50 + 3], "max_tokens": 200, **GREEDY} for n in range(count)]
        running = asyncio.create_task(together(port, bodies))
        await asyncio.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        try:
            late: int | str = (await asyncio.to_thread(post, port, "/v1/completions", {"prompt": [5]})).status
        except ConnectionRefusedError:  # few streams end before
            late = "the server had ended"
        return await running, late

    found, late = asyncio.run(use())
    whole = sum("error" not in events[-1][1] and len(ids_in(events)) == 200 for events in found)
    status = process.wait(60)
    gone = [not child.is_running() or child.status() == psutil.STATUS_ZOMBIE for child in children]
    left = f"{len(gone) - sum(gone)} of {len(gone)}"
    return {"streams": count, "whole": whole, "late": late, "exit_status": status, "children_left": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument(
        "--repeats", type=int, default=6, help="of what is to be seen once nothing is compiled any more"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"
    partial = options.out.with_name(options.out.name + ".partial")  # a run that fails leaves the last results alone
    with tempfile.TemporaryDirectory() as folder, partial.open("w") as out:
        # Of requests that come at once: the queue of `serving`, for they wait there until a round gives them slots.
        slots, room = options.streams, 2 * options.streams
        with serving(checkpoint(Path(folder) / "model"), slots) as (port, process):
            bodies = greedy(options.streams)
            expected = alone(port, bodies)
            once = [
                ("NaN logits", lambda: poisoned(port, room)),
                ("refusals", lambda: refused(port)),
                ("a full queue", lambda: crowded(port, slots)),
                ("fuzzed bodies", lambda: fuzzed(port, options.bodies)),
            ]
            again = [
                ("streams", lambda: streams(port, bodies, expected)),
                ("clients vanish", lambda: vanishing(port, min(400, room))),
                ("NaN logits", lambda: poisoned(port, room)),
            ]
            for name, run in [*once, *(one for one in again for _ in range(options.repeats))]:
                began = time.monotonic()
                found = {"kind": name, **run(), "took_seconds": round(time.monotonic() - began, 1)}
                found["after"] = held(port, process)
                print(json.dumps(found), flush=True)
                print(json.dumps(found), file=out, flush=True)
            found = {"kind": "SIGTERM", **terminated(port, process, min(60, room))}
            print(json.dumps(found))
            print(json.dumps(found), file=out)
    partial.replace(options.out)


if __name__ == "__main__":
    main()
