"""A task: all that differs between pretraining, fine-tuning, distillation and reinforcement learning.

The step takes its `Objective`, the loop all of it. Neither knows which task it runs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from orogen.config.model import ModelConfig
from orogen.config.run import RunConfig
from orogen.data.loader import Corpus
from orogen.data.packing import Batch
from orogen.data.tokenizer import Tokenizer
from orogen.model.lm import Built
from orogen.parallel.plan import Plan

# By name, float32 arrays of shape () or (n,): sums, or their denominators.
ByName = dict[str, Array]


class Metric(NamedTuple):
    """A sum and its count over the global batch: two arrays of one shape."""

    sum: Any
    count: Any

    @property
    def mean(self) -> Any:
        """The sum divided by the count, as the loss divides them."""
        return self.sum / np.maximum(self.count, 1)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step minimises and what it measures.

        loss = Σ_name share[name] · Σ_i sum[name]_i / max(count[name]_i, 1) + the routers' losses

    Sums and counts are added up over devices, and each sum is divided by the count of the global batch: a batch has the
    same loss under every plan and any number of microbatches.

    counts: (batch, depths, plan) -> the denominator of each sum. They may ignore weights, or the signs of weights.
    sums: (model, hidden, batch, plan) -> the sums, with the same names and shapes. hidden: hidden states (b, t, d)
    after the final norm, laid out as the residual stream: the backbone's, then one for each of the `depths` deeper
    ones.
    Both sum over the tokens that this device alone holds: its sequences, and its context rank's part of them. Arrays of
    the batch and the results of `model.heads` cover just these. For hidden states, take `plan.deal(h_btd)` and, of an
    array of the batch beside them, `plan.deal(plan.own(x_bt))`: what `plan.enter` gathers is equal on the ranks of
    `tensor` and would be added once per rank.
    shares: (config, depths) -> the share of each name in the loss. A name without a share is only measured and has no
    gradient.
    deeper: whether the MTP block runs. Without it, `depths` is 0, its parameters have a gradient of zero (weight decay
    still shrinks them), and its routers keep their biases.
    watched: the backbone's layers, by number, after which `sums` also takes the residual streams (b, t, d), as
    `streams`, a list. Only for models without stages, cross-attention and replayed routing.
    frozen: in a task with a `FrozenModel`, `sums` also takes this device's part of its `variables`, under this name.
    """

    counts: Callable[[Batch, int, Plan], ByName]
    sums: Callable[..., ByName]
    shares: Callable[[ModelConfig, int], Mapping[str, float]]
    deeper: bool = True
    watched: tuple[int, ...] = ()

    def depths(self, config: ModelConfig) -> int:
        """The number of tokens predicted after the next one."""
        return config.mtp_depths if self.deeper else 0

    def knowing(self, frozen: Any) -> "Objective":
        """The objective whose sums read these variables of a frozen model; None: there is none."""
        return self if frozen is None else dataclasses.replace(self, sums=partial(self.sums, frozen=frozen))

    def loss(self, totals: ByName, counts: ByName, config: ModelConfig) -> Array:
        """The loss without the routers', from sums over all devices; from those of a microbatch, its share of it."""
        shares = self.shares(config, self.depths(config))
        means = {name: share * totals[name] / jnp.maximum(counts[name], 1) for name, share in shares.items()}
        return jnp.sum(ravel_pytree(means)[0])


class Computation(NamedTuple):
    """What a pass over a batch computes, and how: an objective of a model, on one device of a plan, in `dtype`."""

    objective: Objective
    config: ModelConfig
    plan: Plan
    dtype: str


class Source(Protocol):
    """An endless stream of global batches whose position can be saved and restored to the bit.

    progress: a source whose `take` computes for long calls this on the way, so that the run does not count as hung.
    """

    progress: Callable[[], None]

    def take(self, state: Any) -> Batch:
        """The next batch. state: the `TrainState` that is about to train on it, for sources that sample from it."""
        ...

    def state(self) -> dict[str, Any]:
        """The position after the last batch taken, as plain JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was saved. Raises ConfigError if it is from another source."""
        ...


class FrozenModel(Protocol):
    """A model that a task runs beside the one that it trains, such as a teacher. It never changes, and is neither in
    the optimizer's state nor in checkpoints.

    variables: what the objective reads of it, with logical axes, on the devices of the run's plan.
    """

    @property
    def variables(self) -> Any: ...

    def extras(self, batch: Batch) -> dict[str, Array]:
        """What the objective reads for each token, by name, (b, t, …), in the shardings of a batch. batch: the global
        batch, on the host."""
        ...


class Submodels(Protocol):
    """Smaller models that a task trains within its model, one in each step. The chooser, a tree of arrays that decides
    which one, is trained beside the parameters and saved in checkpoints."""

    def initial(self) -> Any:
        """The chooser before the first step."""
        ...

    def check(self, params: Any) -> None:
        """Raises ConfigError for initial parameters in which submodels cannot be distinguished."""
        ...

    def chosen(self, chooser: Any, step: Array) -> tuple[Any, Callable[[Any], Any]]:
        """The submodel of this step, as `masked` takes it; and a function that maps the gradient with respect to it to
        the chooser after the step."""
        ...

    def masked(self, params: Any, chosen: Any) -> Any:
        """The parameters of a submodel, with zeros for absent units (`Plan.nested`)."""
        ...

    def present_experts(self, chosen: Any) -> list[Array] | None:
        """Which experts a submodel has, 1 or 0 (…, e): one array per load in `loss.Sums`, which it broadcasts to. None:
        it has all experts."""
        ...


class Evaluation(Protocol):
    """Scores a state. `sampled` and `whole` are the names of the scores that `sample` and `full` return.

    progress: called after every batch, so that a run does not count as hung during a long evaluation.
    """

    progress: Callable[[], None]

    @property
    def sampled(self) -> tuple[str, ...]: ...

    @property
    def whole(self) -> tuple[str, ...]: ...

    def sample(self, state: Any) -> dict[str, float]:
        """The scores that are reported during training."""
        ...

    def full(self, state: Any) -> dict[str, float]:
        """The scores that are reported at the end, in addition to those of `sample`."""
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """An objective, the data that it is computed on, and how its outcome is scored.

    open: opens the data; a resumed run passes the tokenizer that it saved.
    source: the batches to train on.
    evaluation: scores a model that is laid out for the run's plan; None if the data has nothing to score.
    measures: (position of the source) -> numbers for the record of the step that took the batch before it.
    keep: writes to the run folder what the model will need in addition to its weights and tokenizer.
    frozen: opens the frozen model that the objective reads, on the devices of the run's plan, once, before
    `evaluation`. more_rows: whether a new model may have more vocabulary rows than its tokenizer has tokens, as
    released models have. submodels: what each step trains in place of the whole model; None: the whole model.
    """

    objective: Objective
    open: Callable[[RunConfig, Tokenizer | None], Corpus]
    source: Callable[[RunConfig, Corpus], Source]
    evaluation: Callable[[RunConfig, Built, Corpus], Evaluation | None]
    measures: Callable[[dict[str, Any]], dict[str, float]] = lambda position: {}
    keep: Callable[[Corpus, Path], None] = lambda corpus, run_dir: None
    frozen: Callable[[RunConfig, Plan], FrozenModel] | None = None
    more_rows: bool = False
    submodels: Submodels | None = None
