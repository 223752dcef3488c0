"""How a plan scales: the same run on more data-parallel ranks."""

import dataclasses
from collections.abc import Iterator

from orogen.config.cluster import ClusterConfig
from orogen.config.run import RunConfig
from orogen.parallel.legal import fits
from orogen.simulate.pictures import Scaled
from orogen.simulate.predict import predict
from orogen.simulate.routing import BALANCED, Routing

DOUBLINGS = 6
MOST_DEVICES = 16_384


def scale(config: RunConfig, cluster: ClusterConfig, *, routing: Routing = BALANCED) -> list[Scaled]:
    """Predictions with 1, 2, 4, ... times the data-parallel ranks, up to MOST_DEVICES devices and as far as the
    plan is legal.

    weak: the batch grows with the ranks. strong: it does not, so each rank has fewer microbatches, as long as they can
    be halved. Raises ConfigError as `predict` does.
    """
    anywhere = dataclasses.replace(cluster, devices=None)
    found = []
    for kind in ("weak", "strong"):
        for scaled in _doubled(config, grow=kind == "weak"):
            prediction = predict(scaled, anywhere, routing=routing)
            found.append(Scaled(kind, prediction.devices, prediction.tokens_per_second))
    return found


def _doubled(config: RunConfig, *, grow: bool) -> Iterator[RunConfig]:
    """The run on 1, 2, 4, ... times the ranks, as far as the plan is legal. grow: with as many times the batch, or with
    fewer microbatches."""
    plan, train = config.plan, config.train
    for factor in (2**n for n in range(1 + DOUBLINGS)):
        fewer = 1 if grow else factor
        if plan.devices * factor > MOST_DEVICES and factor > 1 or plan.microbatches % fewer:
            return
        scaled = dataclasses.replace(plan, data=plan.data * factor, microbatches=plan.microbatches // fewer)
        odd = scaled.schedule == "interleaved" and scaled.microbatches % scaled.stage  # no such schedule
        odd = odd or scaled.stage == 1 and scaled.microbatches % scaled.overlapping
        if odd or not fits(scaled, config.model):
            return
        more = dataclasses.replace(train, batch_size=train.batch_size * (factor if grow else 1))
        yield dataclasses.replace(config, plan=scaled, train=more).check()
