"""Our forward and backward pass beside transformers', on the same weights and tokens, each in its own process.

One GPU does not hold both at once, so they alternate in blocks of passes, and our process ends after each block.
"""

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

from orogen.bench.peers import require_peer
from orogen.bench.worker import Worker
from orogen.bench.workload import Workload
from orogen.config.checks import ConfigError, require

MOST_APART = 1e-2  # largest difference of the two losses, in nats per token
OURS = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the peer's weights are on the same GPU


class UnequalError(Exception):
    """The two programs do not compute the same loss, so nothing is timed."""


def compare(work: Workload, *, peer: str, steps: int, turns: int, deterministic: bool = False) -> dict[str, Any]:
    """Compares both losses, then times alternating blocks of `steps` passes, `turns` of each program.

    ratio: how many times faster ours is, the median over turns of the peer's median time over ours.

    Raises ConfigError on a peer that is not installed and on what either process refuses, UnequalError if the losses
    are further apart than MOST_APART.
    """
    require_peer(peer)
    if work.part != "forward_backward":
        raise ConfigError(f"--peer {peer} with --whole_step; expected one of them: the peer has no optimizer")
    config = work.config()  # refuses a bad workload before any process starts
    require(config.plan.devices == 1, config.plan, "devices", f"1 with --peer {peer}, which runs on one device")
    with tempfile.TemporaryDirectory() as folder:
        weights, tokens = str(Path(folder) / "weights"), str(Path(folder) / "tokens.npy")
        settings = {"work": dataclasses.asdict(work), "deterministic": deterministic, "tokens": None, "weights": None}
        ours = Worker("orogen.bench.train", {**settings, "weights": weights, "tokens": tokens}, OURS)
        facts = ours.facts
        try:
            theirs = Worker("orogen.bench.torch_model", {"folder": weights, "tokens": tokens})
        except BaseException:
            ours.close()
            raise
        with theirs:
            loss = theirs.ask("loss")["loss"]
            if not abs(loss - facts["loss"]) <= MOST_APART:
                ours.close()
                raise UnequalError(f"losses {facts['loss']} and {loss}; expected them within {MOST_APART}")
            blocks, others = [], []
            for turn in range(turns):
                if turn:
                    ours = Worker("orogen.bench.train", settings, OURS)
                blocks.append(ours.ask({"time": steps}))
                ours.close()
                others.append(theirs.ask({"time": steps}))
    medians = [statistics.median(block["seconds"]) for block in others]
    tokens = facts["rows"] * facts["sequence_length"]
    rate = tokens / statistics.median(second for block in others for second in block["seconds"])
    return {
        **facts, "turns": turns, work.part: blocks,
        peer: {
            **theirs.facts, "loss": loss, "blocks": others, "tokens_per_second": round(rate), "gb": others[-1]["gb"],
        },
        "ratio": statistics.median(m * 1e3 / b["ms"] for m, b in zip(medians, blocks, strict=True)),
    }  # fmt: skip
