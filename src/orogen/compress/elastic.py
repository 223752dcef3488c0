"""The task of `orogen distill` with ElasticConfig: one model learns to hold smaller ones, whose sizes a router learns.

Letters: n budgets, h hidden units of the router, c choices of a size.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from orogen.compress.candidates import total_costs
from orogen.compress.choose import pruned_config
from orogen.compress.depth import check_depth
from orogen.compress.nested import LAYERS, Nesting
from orogen.compress.prune import check_target
from orogen.config.checks import ConfigError, require
from orogen.config.elastic import ElasticConfig
from orogen.config.files import write_atomically
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig
from orogen.config.search import SearchConfig
from orogen.data.loader import Corpus
from orogen.model.lm import Built
from orogen.parallel import distributed
from orogen.train.state import TrainState
from orogen.train.task import Evaluation, Task

HIDDEN_UNITS, SLOPE = 128, 0.1  # of the router, as Nemotron Elastic has it
MOST_SUBMODELS = 20_000  # their costs take a third of a millisecond each


class Chooser(NamedTuple):
    """The router: by size, its matrices and biases; and its optimizer's state."""

    router: dict[str, dict[str, Array]]
    moments: optax.OptState


class Chosen(NamedTuple):
    """A step's submodel: one-hot choices by size, which carry the gradient of the probabilities."""

    picks: dict[str, Array]


def make_nesting(model: ModelConfig, elastic: ElasticConfig) -> Nesting:
    """The submodels of a model. Raises ConfigError for sizes or layers that no submodel can have; the message names
    the nearest ones that are possible."""
    choices = {}
    for field in elastic.sizes:
        whole = len(model.layers.main) if field == LAYERS else getattr(model, field)
        values = tuple(sorted(getattr(elastic, field)))
        require(whole is None or values[-1] < whole, elastic, field, f"numbers below {whole}, the model's own")
        choices[field] = (*values, whole)
    main = len(model.layers.main)
    if LAYERS in choices:
        most = main - min(choices[LAYERS])
        expected = f"{most} of the {main} layers, to leave {main - most}, each once, with at least one left"
        known = set(elastic.removal) <= set(range(main)) and len(set(elastic.removal)) == len(elastic.removal)
        require(known and len(elastic.removal) >= most and most < main, elastic, "removal", expected)
    nesting = Nesting(model, choices, elastic.removal)
    for field, values in choices.items():
        for size in values[:-1]:
            _check_submodel(nesting, {field: size})
    expected = f"none with ModelConfig.norm = {model.norm!r}: norms of the form 'rms' alone leave out absent channels"
    require(not elastic.hidden_size or model.norm == "rms", elastic, "hidden_size", expected)
    if model.n_group > 1:
        least = 2 * model.n_group
        expected = (
            f"at least {least}: routing compares the best two experts of each of n_group = {model.n_group} groups"
        )
        require(min(elastic.n_routed_experts, default=least) >= least, elastic, "n_routed_experts", expected)
    return nesting


def _check_submodel(nesting: Nesting, sizes: Mapping[str, int]) -> ModelConfig:
    """The config of a submodel. Raises ConfigError if there is none."""
    model = nesting.config
    try:
        settings = nesting.settings(sizes)
        check_target(model, settings, PlanConfig())
        check_depth(model, settings)
        stay = tuple(n for n in range(len(model.layers.main)) if n not in settings.remove_layers)
        return pruned_config(model, settings, stay, PlanConfig())
    except ConfigError as error:
        raise ConfigError(str(error).replace("PruneConfig.", "ElasticConfig.")) from None


def cost_table(nesting: Nesting, elastic: ElasticConfig) -> np.ndarray:
    """The cost of every submodel as a share of the whole model's, with one axis per size. Raises ConfigError if there
    are too many, or if a budget is below all of them."""
    fields = list(nesting.choices)
    number = math.prod(map(len, nesting.choices.values()))
    if number > MOST_SUBMODELS:
        raise ConfigError(f"ElasticConfig has {number:,} combinations of sizes; expected at most {MOST_SUBMODELS:,}")
    search, found = SearchConfig(context=elastic.context), []
    for sizes in itertools.product(*nesting.choices.values()):
        model = _check_submodel(nesting, dict(zip(fields, sizes, strict=True)))
        kinds = dict.fromkeys(model.layers.main)
        counts_nk = np.array([[model.layers.main.count(letter) for letter in kinds]])
        found.append(float(total_costs(model, search, counts_nk)[elastic.cost][0]))
    table = np.array(found).reshape([len(values) for values in nesting.choices.values()])
    table = table / table.reshape(-1)[-1]  # the last choices are the model's own
    least = math.ceil(table.min() * 1e4) / 1e4
    expected = f"at least {least:g}, what the smallest choices leave of {elastic.cost}"
    require(elastic.budgets[0] >= table.min(), elastic, "budgets", expected)
    return table


class Elastic:
    """`task.Submodels` by a router that sees the budget: for each size two layers, then a Gumbel-softmax. The
    forward pass takes the likeliest choice, so it computes a real submodel; the backward pass takes the gradient of the
    probabilities (straight-through, arXiv:1611.01144). The largest budget takes the whole model."""

    def __init__(self, config: RunConfig):
        self.config, self.elastic = config, config.need("model", "train", "elastic").elastic
        require(config.plan.stage == 1, config.plan, "stage", "1: submodels are not laid out in stages")
        require(config.plan.rms_norm == "plain", config.plan, "rms_norm", "plain: other norms know no absent channels")
        self.nesting = make_nesting(config.model, self.elastic)
        self.costs = cost_table(self.nesting, self.elastic)
        self.allowed = np.stack([self._within(share) for share in self.elastic.budgets])
        self._optimizer = optax.adam(self.elastic.router_learning_rate)

    def initial(self) -> Chooser:
        """A router without a preference. See `task.Submodels`."""
        budgets, key = len(self.elastic.budgets), jax.random.key(self.config.train.seed)
        router = {}
        for number, (field, choices) in enumerate(self.nesting.choices.items()):
            first, second = jax.random.split(jax.random.fold_in(key, number))
            router[field] = {
                "in_nh": jax.random.normal(first, (budgets, HIDDEN_UNITS)),
                "in_h": jnp.zeros(HIDDEN_UNITS),
                "out_hc": jax.random.normal(second, (HIDDEN_UNITS, len(choices))) * 0.1 * HIDDEN_UNITS**-0.5,
                "out_c": jnp.zeros(len(choices)),
            }
        return Chooser(router, self._optimizer.init(router))

    def check(self, params: Any) -> None:
        """See `task.Submodels`."""
        self.nesting.check(params)

    def chosen(self, chooser: Chooser, step: Array) -> tuple[Chosen, Callable[[Any], Chooser]]:
        """See `task.Submodels`."""
        of_budget, of_noise = jax.random.split(jax.random.fold_in(jax.random.key(self.config.train.seed), step))
        budget = jax.random.choice(of_budget, len(self.elastic.budgets), p=self._weights(step))
        temperature = self.elastic.temperature * self.elastic.temperature_decay**step
        pick = lambda router: self._picks(router, budget, step, of_noise, temperature)  # noqa: E731
        picks, back = jax.vjp(pick, chooser.router)

        def learned(gradient: Chosen) -> Chooser:
            of_budget = jax.grad(self.budget_loss)(chooser.router, budget, step)
            total = jax.tree.map(jnp.add, back(gradient.picks)[0], of_budget)
            updates, moments = self._optimizer.update(total, chooser.moments)
            router: Any = optax.apply_updates(chooser.router, updates)
            return Chooser(router, moments)

        return Chosen(picks), learned

    def masked(self, params: Any, chosen: Chosen) -> Any:
        """See `task.Submodels`."""
        return self.nesting.masked(params, chosen.picks)

    def present_experts(self, chosen: Chosen) -> list[Array] | None:
        """See `task.Submodels`."""
        return self.nesting.present_experts(chosen.picks)

    def logits(self, router: Any, budget: Array | int, step: Array | int) -> dict[str, Array]:
        """By size (c), sharpened."""
        progress = jnp.minimum(step / max(self.config.train.steps - 1, 1), 1.0)
        scale = 1 + (self.elastic.sharpness - 1) * progress

        def of(part: Mapping[str, Array]) -> Array:
            hidden_h = jax.nn.leaky_relu(part["in_nh"][budget] + part["in_h"], SLOPE)
            return scale * (jnp.dot(hidden_h, part["out_hc"], precision="highest") + part["out_c"])

        return {field: of(part) for field, part in router.items()}

    def budget_loss(self, router: Any, budget: Array, step: Array) -> Array:
        """budget_weight x |expected cost / budget - 1|, 0 within the tolerance and for the whole model."""
        expected = jnp.asarray(self.costs, jnp.float32)
        for logits_c in self.logits(router, budget, step).values():
            expected = jnp.tensordot(jax.nn.softmax(logits_c), expected, axes=1, precision="highest")
        shares = jnp.asarray(self.elastic.budgets, jnp.float32)
        apart = jnp.abs(expected / shares[budget] - 1)
        counts = (apart >= self.elastic.tolerance) & (budget < len(shares) - 1)
        return jnp.where(counts, self.elastic.budget_weight * apart, 0)

    def sizes(self, chooser: Chooser, budget: int) -> tuple[dict[str, int], float]:
        """The likeliest submodel that a budget allows, and its share of the whole model's cost."""
        if budget == len(self.elastic.budgets) - 1:
            return {field: choices[-1] for field, choices in self.nesting.choices.items()}, 1.0
        total: Any = np.zeros(())
        for logits_c in self.logits(chooser.router, budget, self.config.train.steps).values():
            total = np.add.outer(total, np.asarray(logits_c, np.float64))
        total[~self.allowed[budget]] = -np.inf
        place = tuple(map(int, np.unravel_index(np.argmax(total), total.shape)))
        sizes = {field: values[i] for (field, values), i in zip(self.nesting.choices.items(), place, strict=True)}
        return sizes, float(self.costs[place])

    def _weights(self, step: Array) -> Array:
        """How likely each budget is in this step."""
        elastic = self.elastic
        first = np.array(elastic.weights or (1.0,) * len(elastic.budgets), np.float32)
        later = np.array(elastic.later_weights or first, np.float32)
        after = elastic.later_after if elastic.later_weights else self.config.train.steps
        return jnp.where(step < after, first / first.sum(), later / later.sum())

    def _within(self, share: float) -> np.ndarray:
        """Of every submodel, whether a budget allows it: those within the tolerance below it, or, if there are none,
        all below it. An expected cost alone may be that of a mixture of far smaller ones."""
        keeps = self.costs <= share
        near = keeps & (self.costs >= (1 - self.elastic.tolerance) * share)
        return near if near.any() else keeps

    def _picks(
        self, router: Any, budget: Array, step: Array, key: Array, temperature: Array
    ) -> dict[str, Array]:  # fmt: skip
        """Of the submodels that the budget allows, the likeliest after noise on each size's logits, so that what is
        trained is what `sizes` may cut out. The gradient is that of each choice's probability."""
        total: Any = jnp.zeros(())
        for number, logits_c in enumerate(self.logits(router, budget, step).values()):
            noise_c = jax.random.gumbel(jax.random.fold_in(key, number), logits_c.shape)
            total = jnp.add(total[..., None], (logits_c + noise_c) / temperature)
        soft = jax.nn.softmax(jnp.where(jnp.asarray(self.allowed)[budget], total, -jnp.inf), axis=None)
        place = jnp.unravel_index(jnp.argmax(soft), soft.shape)
        picks, last = {}, len(self.elastic.budgets) - 1
        for number, (field, choices) in enumerate(self.nesting.choices.items()):
            soft_c = soft.sum([axis for axis in range(soft.ndim) if axis != number])
            hard_c = jnp.arange(len(choices)) == jnp.where(budget == last, len(choices) - 1, place[number])
            # The router does not choose the whole model, so it learns nothing from it.
            learned = (budget < last) * (soft_c - jax.lax.stop_gradient(soft_c))
            picks[field] = hard_c.astype(jnp.float32) + learned
        return picks


class Budgets:
    """An `Evaluation` of the whole model, and of each budget's submodel. While a submodel is scored,
    its masked parameters are a further float32 copy, which no prediction of memory counts."""

    def __init__(self, whole: Evaluation, elastic: Elastic, run_dir: Path):
        self._whole, self._elastic, self._folder = whole, elastic, run_dir
        self._shares = elastic.elastic.budgets[:-1]
        self._masked = jax.jit(elastic.nesting.masked)
        self.progress: Callable[[], None] = lambda: None
        self.sampled, self.whole = (
            (*names, *(f"{name}_at_{share:g}" for share in self._shares for name in names))
            for names in (whole.sampled, whole.whole)
        )

    def sample(self, state: TrainState) -> dict[str, float]:
        """The scores of a sample."""
        return self._scores(state, self._whole.sample)

    def full(self, state: TrainState) -> dict[str, float]:
        """The scores of the whole split. Writes, for each budget below 1, the gin file by which `orogen prune` cuts the
        submodel out."""
        for number, share in enumerate(self._shares):
            text = self._text(*self._elastic.sizes(state.chooser, number)).encode()
            distributed.from_first(functools.partial(write_atomically, self._folder / f"budget_{share:g}.gin", text))
        return self._scores(state, self._whole.full)

    def _scores(self, state: TrainState, score: Callable[[TrainState], dict[str, float]]) -> dict[str, float]:
        self._whole.progress = self.progress
        found = score(state)
        for number, share in enumerate(self._shares):
            picks = self._elastic.nesting.picks(self._elastic.sizes(state.chooser, number)[0])
            of_share = score(state._replace(params=self._masked(state.params, picks)))
            found |= {f"{name}_at_{share:g}": value for name, value in of_share.items()}
        return found

    def _text(self, sizes: Mapping[str, int], cost: float) -> str:
        settings = self._elastic.nesting.settings(sizes)
        bound = {**settings.widths, "remove_layers": settings.remove_layers, "width_scores": settings.width_scores}
        lines = [f"PruneConfig.{field} = {value!r}" for field, value in bound.items()]
        return "\n".join([f"# {cost:.4f} of the model's {self._elastic.elastic.cost}", *lines, ""])


def elastic_task(task: Task, config: RunConfig, run_dir: Path) -> Task:
    """The task that trains submodels in place of the whole model. Raises ConfigError for budgets that no submodel meets
    and sizes that the model's groups do not divide."""
    elastic = Elastic(config)
    expected = "above 0 with ElasticConfig: submodels are compared on held-out text"
    require(config.data is not None and config.data.heldout_fraction > 0, config.data, "heldout_fraction", expected)

    def evaluation(config: RunConfig, built: Built, corpus: Corpus) -> Evaluation | None:
        whole = task.evaluation(config, built, corpus)
        return whole and Budgets(whole, elastic, run_dir)

    return dataclasses.replace(task, submodels=elastic, evaluation=evaluation)
