"""The time and memory of a training step of a plan on a cluster, from configs alone; no jax."""

from orogen.config.cluster import ClusterConfig
from orogen.config.run import RunConfig
from orogen.simulate.prediction import Prediction
from orogen.simulate.routing import BALANCED, Routing


def predict(config: RunConfig, cluster: ClusterConfig | None = None, *, routing: Routing = BALANCED) -> Prediction:
    """The step of `config` on `cluster` (None: H100s, as many as the plan has devices).

    config: model, plan and train are needed; without an optimizer it is AdamW with float32 moments. Raises ConfigError
    for an unknown hardware or constant, or a plan that does not match the cluster or the model.
    """
    raise NotImplementedError
