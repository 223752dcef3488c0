"""The mixture-of-experts mixer: router, dispatch, experts, latent projections and shared expert.

Letters: b batch, t time of the tokens that this rank routes, n tokens (b · t), d model, w expert width, f hidden, k
experts per token, e experts, r rows of this rank's experts, s source ranks.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from orogen.config.model import ModelConfig
from orogen.config.precision import GROUPS
from orogen.layers.documents import Documents
from orogen.layers.linear import add_bias, linear, linear_plain, rounds_experts, token_numbers
from orogen.layers.mlp import MLP
from orogen.layers.multiply import flat
from orogen.layers.parameter import normal, parameter
from orogen.layers.probe import dealt_squares, measuring, own_tokens, probe_of, row_squares
from orogen.moe.dispatch import DISPATCHES, drop_margin, expert_capacity, within_capacity
from orogen.moe.experts import Experts
from orogen.moe.measured import expert_statistics
from orogen.moe.router import Router, RouterLosses, Routing, expert_counts, router_losses
from orogen.parallel.context import zigzag
from orogen.parallel.plan import Plan
from orogen.precision.calibration import with_scores

ROUTED = GROUPS["routed"]


class Replay(NamedTuple):
    """A routing to use instead of the router's own, (b, t, k): the experts of each token, int32, negative where the
    token chooses for itself; and whether each assignment was kept, bool, or dropped."""

    experts: Array
    kept: Array


class Choice(NamedTuple):
    """The routing that was used, in the form in which it can be replayed; the margin (b, t) of the layer's own choice;
    and whether (b, t) a replayed choice differed from it, in the experts (see Routing) or in which assignments were
    dropped (see `drop_margin`)."""

    replay: Replay
    margin: Array
    flipped: Array


class MoEStats(NamedTuple):
    """One layer's statistics, summed over this rank's tokens, padding left out.

    load: (e,) float32, assignments per expert before any is dropped; dropped: assignments beyond an expert's capacity;
    overflow: assignments that did not fit into a buffer (with any, the step must not be used); losses: the router's;
    choice: each token's.
    """

    load: Array
    dropped: Array
    overflow: Array
    losses: RouterLosses
    choice: Choice


class MoE(nnx.Module):
    """Σ_j w_j · expert_j(x) + shared(x); with a latent size, experts work between two projections (LatentMoE).

    Gate and shared expert read the full width (arXiv:2512.20856, section 2.2). If the shared expert has a gate of its
    own, its output is multiplied by sigmoid(x · shared_gate) (arXiv:2407.10671).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, std, out_std = config.hidden_size, config.init_std, config.output_init_std
        self.n_experts, self.balance = config.n_routed_experts, config.router_balance
        self.router = Router(config, rngs)
        self.experts = Experts(config, rngs)
        latent, hidden = config.moe_latent_size, config.moe_shared_expert_intermediate_size
        self.latent_down = normal(rngs, (size, latent), ("embed", None), std=std) if latent else None
        self.latent_up = normal(rngs, (latent, size), (None, "embed"), std=out_std) if latent else None
        biased = config.shared_expert_bias
        self.latent_down_bias = parameter(jnp.zeros(latent), (None,)) if latent and biased else None
        self.latent_up_bias = parameter(jnp.zeros(size), ("norm",)) if latent and biased else None
        self.shared = MLP(config, hidden, bias=biased, rngs=rngs, prefix="shared_") if hidden else None
        gated = config.moe_shared_expert_gate
        self.shared_gate = normal(rngs, (size, 1), ("embed", None), std=std) if gated else None

    def __call__(self, x_btd: Array, docs: Documents, plan: Plan, given: Any = None) -> tuple[Array, Any]:
        """y (b, t, d) and statistics: a MoEStats, or those that a probe requests. docs: those of the whole context
        rank; given: a Replay, or a probe."""
        y_btd, kept = self._routed(plan.deal(x_btd), docs, plan, given)
        y_btd = plan.collect(y_btd)
        if self.shared is not None:
            with jax.named_scope("shared_expert"):
                shared_btd, hidden_btf = self._shared(x_btd, self.shared, plan)
            y_btd = y_btd + shared_btd
            if measuring(given):
                kept["shared"] = row_squares(hidden_btf, docs, plan, "mlp")
        return y_btd, kept

    def start(self, allocator: Any, dtype: Any) -> None:
        """None: the layer treats each token by itself, so there is nothing to cache."""

    def cache_axes(self, allocator: Any) -> None:
        """None, as in `start`."""

    def _routed(self, x_btd: Array, docs: Documents, plan: Plan, given: Any) -> tuple[Array, Any]:
        """The routed experts' part of y, for the tokens that this rank alone routes, and the statistics."""
        probe, replay = probe_of(given)
        with jax.named_scope("router"):
            logits_bte, routing = self.router(x_btd, plan, None if replay is None else replay.experts)
            stats, capacity = self._account(logits_bte, routing, own_tokens(docs, plan), plan, replay)
            keep_btk = stats.choice.replay.kept
        with jax.named_scope("experts"):
            u_btw = x_btd
            if self.latent_down is not None:
                u_btw = add_bias(linear(x_btd, self.latent_down, plan, "latent_down"), self.latent_down_bias)
                u_btw = checkpoint_name(u_btw, "latent")
            dispatcher = DISPATCHES[plan.config.dispatch]
            with jax.named_scope("dispatch"):
                sent = flat(u_btw), flat(routing.experts), flat(keep_btk)
                rows, group_sizes, ticket = dispatcher.dispatch(
                    *sent, plan, n_experts=self.n_experts, capacity=capacity
                )
            rows = checkpoint_name(rows, "rows")
            if isinstance(group_sizes, Array):
                group_sizes = checkpoint_name(group_sizes, "routing")
            number_r = None
            if rounds_experts(plan):
                number_r = self._numbers(x_btd, routing, keep_btk, plan, capacity)
            stats = stats._replace(overflow=stats.overflow + ticket.overflow)

            def outcome(plan: Plan) -> tuple[Array, tuple[Array, Array, Array]]:
                """The part of y; the experts' outputs (r, w), their hidden units (r, f), and the combined outputs."""
                returned, hidden_rf = self.experts.with_hidden(rows, group_sizes, plan, number_r)
                with jax.named_scope("combine"):
                    y_nw = dispatcher.combine(returned, flat(routing.weights), ticket, plan)
                y_btw = y_btd = checkpoint_name(y_nw, "combined").reshape(u_btw.shape)
                if self.latent_up is not None:
                    y_btd = add_bias(linear(y_btw, self.latent_up, plan, "latent_up"), self.latent_up_bias)
                return y_btd, (returned, hidden_rf, y_btw)

            measured = plan.recipe.measures(ROUTED[0])
            if measured is not None:
                return with_scores(lambda plan: outcome(plan)[0], measured.candidates, ROUTED, plan), stats
            y_btd, (returned, hidden_rf, y_btw) = outcome(plan)
        if not measuring(probe):
            return y_btd, stats
        results: Any = (returned, hidden_rf), group_sizes, plan
        kept = expert_statistics(routing, keep_btk, *results, n_experts=self.n_experts, capacity=capacity)
        if self.latent_up is not None:
            latent = {"latent_in": u_btw, "latent_out": y_btw}
            kept |= {name: dealt_squares(a_btw, docs, plan) for name, a_btw in latent.items()}
        return y_btd, kept

    def _numbers(self, x_btd: Array, routing: Routing, keep_btk: Array, plan: Plan, capacity: int) -> Array:
        """(r,) int32: the index in the global batch of each dispatched row's token; -1 for a row without one."""
        # As float32, which every dispatch moves: exact, since `check_precision` bounds the tokens of a batch. Shifted
        # by one, since rows without a token are zero.
        number_n1 = (token_numbers(x_btd, plan).reshape(-1, 1) + 1).astype(jnp.float32)
        sent = number_n1, flat(routing.experts), flat(keep_btk)
        dispatcher = DISPATCHES[plan.config.dispatch]
        number_r1 = dispatcher.dispatch(*sent, plan, n_experts=self.n_experts, capacity=capacity).rows
        return number_r1[:, 0].astype(jnp.int32) - 1

    def _shared(self, x_btd: Array, expert: MLP, plan: Plan) -> tuple[Array, Array]:
        """The shared expert's part of y (b, t, d), and its hidden units (b, t, f) of this rank."""
        hidden_btf = expert.hidden(x_btd, plan)
        y_btd = expert.project(hidden_btf, plan)
        if self.shared_gate is None:
            return y_btd, hidden_btf
        gate_bt1 = linear_plain(x_btd, self.shared_gate, plan)
        y_btd, gate_bt1 = (checkpoint_name(a, "shared_out") for a in (y_btd, gate_bt1))
        return y_btd * jax.nn.sigmoid(gate_bt1), hidden_btf

    def _account(
        self, logits_bte: Array, routing: Routing, valid_bt: Array, plan: Plan, replay: Replay | None
    ) -> tuple[MoEStats, int]:
        """The statistics, including which assignments are kept, and an expert's capacity for this device's tokens: its
        capacity per source rank, times the source ranks that this device stands for (`Plan.sources`)."""
        k = routing.experts.shape[-1]
        sources = math.prod(plan.sources)
        tokens = valid_bt.size // sources
        capacity = expert_capacity(tokens, k, self.n_experts, plan.config.capacity_factor)
        policy = plan.config.drop_policy
        data, context, tensor = plan.sources
        by_source = partial(_split, data=data, context=context, tensor=tensor)
        experts, weights = by_source(routing.experts), by_source(routing.weights)
        keep = jax.vmap(partial(within_capacity, n_experts=self.n_experts, capacity=capacity, policy=policy))(
            experts, weights, by_source(valid_bt[..., None])[..., 0]
        )
        keep_btk = _join(keep, routing.experts.shape, *plan.sources)
        # Padding does not count: two runs of it attend to each other on some ranks that hold part of a row only.
        flipped_bt = routing.flipped & valid_bt
        choice = Choice(Replay(routing.experts, keep_btk), routing.margin, flipped_bt)
        if replay is not None:
            margins = jax.vmap(partial(drop_margin, n_experts=self.n_experts, policy=policy))(
                experts, weights, keep, by_source(replay.kept)
            )
            margin_bt = _join(margins[..., None], (*valid_bt.shape, 1), *plan.sources)[..., 0]
            differs_bt = jnp.any(keep_btk != replay.kept, -1) & valid_bt
            margin_bt = jnp.maximum(jnp.where(flipped_bt, routing.margin, 0), margin_bt)
            choice = Choice(replay, margin_bt, flipped_bt | differs_bt)
        valid_btk = jnp.broadcast_to(valid_bt[..., None], keep_btk.shape)
        stats = MoEStats(
            load=expert_counts(routing.experts, valid_btk, self.n_experts, axes=(0, 1, 2)),
            dropped=jnp.sum(valid_btk & ~keep_btk, dtype=jnp.float32),
            overflow=jnp.zeros(()),
            losses=router_losses(
                logits_bte,
                routing.scores,
                valid_bt,
                plan,
                k=k,
                balance=self.balance,
                present_e=self.router.present(plan),
            ),
            choice=choice,
        )
        return stats, capacity * sources


def _split(x_btk: Array, data: int, context: int, tensor: int) -> Array:
    """(s, n, k): the tokens of each of s = data x context x tensor source ranks."""
    b, t, k = x_btk.shape
    x_btk = x_btk[:, zigzag(t, context)]
    columns = context * tensor
    return x_btk.reshape(data, b // data, columns, t // columns, k).swapaxes(1, 2).reshape(data * columns, -1, k)


def _join(x_snk: Array, shape: tuple[int, ...], data: int, context: int, tensor: int) -> Array:
    """The inverse of `_split`."""
    b, t, k = shape
    columns = context * tensor
    x_btk = x_snk.reshape(data, columns, b // data, t // columns, k).swapaxes(1, 2).reshape(shape)
    return x_btk[:, np.argsort(zigzag(t, context))]
