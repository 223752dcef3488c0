"""Malformed bodies, a few hundred of those that `fuzz.py` draws."""

import asyncio

from tests.infer.serve.fuzz import run


def test_malformed_bodies_are_answered():
    faults, statuses = asyncio.run(run(0, 300))
    assert faults == []
    assert statuses[200] > 30 and statuses[400] > 100
