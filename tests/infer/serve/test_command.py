"""`orogen serve`: what it refuses before a model is read, and a tiny model behind a socket."""

import importlib.util
import json
import os
import signal
import socket
import sys
import urllib.request
from pathlib import Path

import pytest
from tests.helpers import child_process
from tests.infer.serve.live import post

from orogen.checkpoint.open import open_model
from orogen.cli import main
from orogen.infer.generate import generate

CHECKPOINT = Path(__file__).parents[2] / "fixtures" / "checkpoints" / "whole"


def test_the_extra_is_named_where_it_is_missing(refused, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else found(name, *a))
    assert refused("serve", "--checkpoint", CHECKPOINT) == (
        "uvicorn not installed; expected what `pip install 'orogen[serve]'` installs"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "absent"], "checkpoint 'absent' has no config.gin and no config.json"),
        (["--api_key", " "], "--api_key or OROGEN_API_KEY is empty or no plain ASCII"),
        (["--chat_template", "absent"], "chat template 'absent' is no file; expected one, or one of nemotron_nano_2"),
        (["--gin_bindings", "EngineConfig.slots = 0"], "EngineConfig.slots is 0; expected a number above 0"),
        (["--slots", "2", "--gin_bindings", "EngineConfig.slots = 3"], "EngineConfig.slots is bound twice"),
        (["--gin_bindings", "ModelConfig.vocab_size = 3"], "bindings that nothing read: ModelConfig.vocab_size"),
        (["--gin_bindings", "PlanConfig.stage = 2"], "stage"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1 --port 0:"),
        (["--weights", "."], "--weights .; expected a folder that exists, and a key: OROGEN_API_KEY"),
        (["--weights", "absent", "--api_key", "k"], "--weights absent; expected a folder that exists"),
    ],
)
def test_bad_options(capsys, arguments, message):
    given = [] if "--checkpoint" in arguments else ["--checkpoint", str(CHECKPOINT)]
    assert main(["serve", "--port", "0", *given, *arguments]) == 2
    *_, line = capsys.readouterr().err.splitlines()  # after what is said of a checkpoint of an earlier release
    assert line.startswith("orogen: ") and message in line


def test_a_port_that_is_taken(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port}: " in refused("serve", "--checkpoint", CHECKPOINT, "--port", port)


def http_get(port, path):
    return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}").read()


def test_a_tiny_model_answers_as_it_does_without_a_server():
    command = [sys.executable, "-m", "orogen.cli", "serve", "--checkpoint", str(CHECKPOINT), "--port", "0", "--json",
               "--slots", "4", "--max_length", "128", "--name", "tiny",
               "--weights", str(CHECKPOINT.parent)]  # fmt: skip
    environment = {**os.environ, "OROGEN_API_KEY": "k", "JAX_NUM_CPU_DEVICES": "1"}
    with child_process(command, env=environment) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told["model"] == "tiny"
        port = told["port"]
        assert post(port, "/v1/completions", {"prompt": "a"}).status == 401
        ask = {"prompt": "import ", "max_tokens": 12, "temperature": 0, "ignore_eos": False, "return_token_ids": True}
        key = {"authorization": "Bearer k"}
        (choice,) = json.load(post(port, "/v1/completions", ask, headers=key))["choices"]
        stream = post(port, "/v1/completions", {**ask, "stream": True}, headers=key).read().decode()
        events = [json.loads(line[6:]) for line in stream.split("\n\n")[:-2]]
        assert [i for e in events for i in e["choices"][0]["token_ids"]] == choice["token_ids"]
        assert "".join(e["choices"][0]["text"] for e in events) == choice["text"]
        same = {"folder": CHECKPOINT.name, "version": 5}
        told = json.load(post(port, "/v1/weights", same, headers=key))
        assert told == {**same, "instance": told["instance"]}
        (again,) = json.load(post(port, "/v1/completions", ask, headers=key))["choices"]
        assert again["text"] == choice["text"] and set(again["token_versions"]) == {5}
        assert b"orogen_slots_used 0.0" in http_get(port, "/metrics")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    (text,) = generate(open_model(CHECKPOINT), ["import "], tokens=12, temperature=0.0)
    assert choice["text"] == text
