"""The experiment that times decoding programs over caches of arbitrary numbers still knows what a program takes."""

import importlib

import pytest
from tests.infer.engines import opened

from orogen.config.engine import EngineConfig
from orogen.infer.engine import Engine


@pytest.mark.parametrize("running", [None, 2])
def test_a_decoding_program_decodes_without_prompts(monkeypatch, running):
    """Every slot that runs emits a token in each step; where one does not, `measure` raises."""
    monkeypatch.syspath_prepend("experiments/decode_throughput")
    contexts = importlib.import_module("contexts")
    config = EngineConfig(slots=3, page=contexts.PAGE, max_length=128, steps=4, prefix_cache=False)
    engine = Engine(opened("M*"), config)
    point = contexts.Point(engine.programs, 3, 128, running)
    found = point.measure(engine.programs.decoder(contexts.GREEDY), calls=1)
    assert (found["batch"], found["context"]) == (3, 128)
    assert point.alone(calls=1) > 0
