"""Sets of XLA's flags by name: that XLA knows each, that the environment's own count, and what is refused."""

import os
import subprocess
import sys

import pytest

from orogen.config.checks import ConfigError
from orogen.parallel.runtime import XLA_FLAGS, add_xla_flags, asks_for_same_bits


def test_sets_stand_before_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--mine=1")
    add_xla_flags(["deterministic", "latency_hiding"])
    flags = os.environ["XLA_FLAGS"].split()
    expected = [*XLA_FLAGS["deterministic"], *XLA_FLAGS["latency_hiding"], "--mine=1"]
    assert flags == expected  # the last of a name counts
    add_xla_flags(["deterministic"])
    assert os.environ["XLA_FLAGS"].split() == expected


def test_no_set_changes_nothing(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    add_xla_flags([])
    assert "XLA_FLAGS" not in os.environ


def test_unknown_sets_are_refused(refused):
    with pytest.raises(ConfigError, match=r"--xla has 'fast'; expected some of latency_hiding, deterministic"):
        add_xla_flags(["deterministic", "fast"])
    assert refused("params", "--gin_file", "x.gin", "--xla", "fast").startswith("--xla has 'fast'; expected some of")


def test_xla_knows_every_flag():
    """XLA ends the process on one that it does not know, whatever the device."""
    flags = " ".join(flag for flags in XLA_FLAGS.values() for flag in flags)
    run = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", run], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "2\n", done.stderr


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ("", False), ("--xla_gpu_deterministic_ops", True), ("--xla_gpu_deterministic_ops_of_mine=true", False),
        ("--xla_gpu_deterministic_ops=true --other=1", True),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=False", False),
    ],
)  # fmt: skip
def test_the_last_flag_says_whether_bits_are_to_be_the_same(monkeypatch, flags, asked):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert asks_for_same_bits() is asked
