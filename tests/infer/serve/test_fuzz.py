"""Malformed bodies, some of those that `fuzz.py` draws."""

import asyncio
import os

from tests.infer.serve.fuzz import run

COUNT = int(os.environ.get("OROGEN_FUZZED_BODIES", "100"))


def test_malformed_bodies_are_answered():
    faults, statuses = asyncio.run(run(0, COUNT))
    assert faults == []
    assert statuses[200] > 0.1 * COUNT and statuses[400] > 0.3 * COUNT
