"""The language model: embedding, backbone, final norm, head, and the multi-token-prediction block.

Letters: b batch, t time, d model, v vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import Array

from orogen.config.model import ModelConfig
from orogen.layers.documents import Documents
from orogen.layers.embedding import Embedding, Head, ScoreHead, logits
from orogen.layers.linear import head_matrix
from orogen.layers.norm import make_norm
from orogen.model.block import Stack, repeats
from orogen.model.by_letter import plain, state_of
from orogen.model.cross_attention import seen_by
from orogen.model.layout import Layout, Whole
from orogen.model.mtp import MTPBlock, shifted
from orogen.model.resampler import Resampler
from orogen.model.vocabulary import resized
from orogen.parallel.context import later
from orogen.parallel.placement import Released
from orogen.parallel.plan import Plan


class LanguageModel(nnx.Module):
    """A pattern of residual layers between an embedding and a head, which may be one matrix (`head` is then None)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, repeated: bool = True):
        """repeated: whether layers that repeat are stacked and scanned over; else every layer is separate."""
        fold = repeats if repeated else tuple
        self.embedding = Embedding(config, rngs)
        self.backbone = Stack(fold(config.layers.main), config, rngs)
        self.norm = make_norm(config)
        self.head = None if config.tie_word_embeddings else Head(config, rngs)
        self.mtp = MTPBlock(config, rngs, fold(config.layers.mtp)) if config.layers.mtp else None
        self.resampler = Resampler(config, rngs) if "x" in config.layers.main else None
        self.score = ScoreHead(config, rngs) if config.score_head else None  # last, so that it shifts no random draws
        self.mtp_depths, self.vocab_size = config.mtp_depths, config.vocab_size

    def given_images(self, extras: Mapping[str, Array], plan: Plan) -> Any:
        """The images that the backbone's cross-attention layers are `given` for a batch with these extras; None without
        images."""
        images = None if self.resampler is None else self.resampler.images(extras, plan)
        return seen_by(self.backbone.items, images)

    def hidden(self, tokens_bt: Array, docs: Documents, plan: Plan, given: Any = None) -> tuple[Array, Any]:
        """The final-normed hidden state (b, t, d), laid out as the residual stream, and what the layers keep."""
        x_btd = self.embedding(tokens_bt, docs, plan)
        x_btd, kept = self.backbone(x_btd, docs, plan, given)
        with jax.named_scope("final_norm"):
            return self.norm(x_btd, plan), kept

    def deeper(
        self, h_btd: Array, tokens_bt: Array, docs: Documents, plan: Plan, given: Any = None
    ) -> list[tuple[Array, Any]]:
        """(hidden state, what the layers keep) of each multi-token-prediction depth 1, 2, …; empty without a block."""
        depths = []
        if self.mtp is None:
            return depths
        plan = plan.of_layers(self.backbone.size)
        for depth in range(1, self.mtp_depths + 1):
            with jax.named_scope(f"mtp_{depth}"):
                # A later token keeps its own position.
                moved = docs._replace(positions_bt=later(docs.positions_bt, depth, plan))
                embedded_btd = self.embedding(later(tokens_bt, depth, plan), moved, plan)
                inside = shifted(docs, depth, plan)
                h_btd, kept = self.mtp(h_btd, embedded_btd, inside, plan.at_depth(depth), given and given[depth - 1])
            depths.append((h_btd, kept))
        return depths

    def logits(self, tokens_bt: Array, docs: Documents, plan: Plan) -> Array:
        """Logits (b, t, v) float32 of the next token, whole on every rank."""
        h_btd, _ = self.hidden(tokens_bt, docs, plan)
        return self.project(plan.enter(h_btd), plan)

    def project(self, h_btd: Array, plan: Plan) -> Array:
        """Logits (b, t, v) float32 of final hidden states, whole on every rank."""
        return logits(h_btd, self.head_matrix(plan), plan)[..., : self.vocab_size]

    def head_matrix(self, plan: Plan) -> Array:
        """The head (d, this rank's part of v), gathered along d; the transposed embedding if they are tied. The last
        columns, counted over all ranks, may be padding: see `model.vocabulary`."""
        return head_matrix(self.embedding.weight, None if self.head is None else self.head.weight, plan)


class Built(NamedTuple):
    """A model split into its static graph and abstract parameters and buffers, which carry axis names and are laid out
    by `layout`, with `vocab_rows` rows for a vocabulary of `vocab_size`."""

    graph: nnx.GraphDef
    params: nnx.State
    buffers: nnx.State
    vocab_size: int
    vocab_rows: int
    layout: Layout

    def laid(self, state: nnx.State) -> nnx.State:
        """Parameters or buffers of the whole model, with `vocab_size` rows, laid out and padded as here."""
        return self.layout.split(resized(state, self.vocab_rows))

    def whole(self, state: nnx.State) -> nnx.State:
        """The inverse of `laid`."""
        return resized(self.layout.join(state), self.vocab_size)


def build(config: ModelConfig, layout: Layout | None = None, vocab_rows: int | None = None) -> Built:
    """The model of `config` without allocating anything. layout: that of its layers; None: whole. vocab_rows: rows of
    embedding and head, as `PlanConfig.vocab_rows` gives them for a plan; None: those of the vocabulary."""
    model = jax.eval_shape(lambda: LanguageModel(config, nnx.Rngs(0)))
    graph, params, buffers = nnx.split(model, nnx.Param, ...)
    layout = layout or Whole(config.layers.main, config.layers.mtp)
    whole = Built(graph, params, buffers, config.vocab_size, vocab_rows or config.vocab_size, layout)
    laid = jax.eval_shape(whole.laid, params), jax.eval_shape(whole.laid, buffers)
    return whole._replace(params=laid[0], buffers=laid[1])


def written_out(
    config: ModelConfig, built: Built, *states: nnx.State, release: bool = False
) -> tuple[Built, tuple[nnx.State, ...]]:
    """The same model, laid out whole and with every layer separate, and its parameters or buffers in that form. For
    decoding: a loop over layers would copy each layer's weights out of their stack, which takes as long as a step.

    release: the arrays of repeated layers move to the host, are deleted, and come back layer by layer, so that the
    devices never hold the weights twice; the given states cannot be used afterwards.
    """
    model = jax.eval_shape(lambda: LanguageModel(config, nnx.Rngs(0), repeated=False))
    graph = nnx.split(model)[0]

    def apart(state: nnx.State) -> nnx.State:
        tree, layout, main = dict(state), built.layout, len(config.layers.main)
        layers = [plain(layout.layer(state, number)) for number in range(main + len(config.layers.mtp))]
        tree["backbone"] = state_of(tuple(layers[:main]))
        if layers[main:]:
            tree["mtp"] = {**plain(state.get("mtp", {})), "layers": state_of(tuple(layers[main:]))}
        return nnx.State({name: part for name, part in tree.items() if part})

    abstract = built._replace(
        graph=graph, params=jax.eval_shape(apart, built.params), buffers=jax.eval_shape(apart, built.buffers)
    )
    if release:
        states = tuple(jax.tree.map(Released, state) for state in states)
        taken = lambda a: a.whole() if isinstance(a, Released) else a  # noqa: E731
        return abstract, tuple(jax.tree.map(taken, apart(state)) for state in states)
    return abstract, tuple(apart(state) for state in states)


def initial_state(config: ModelConfig, seed: int | Array) -> tuple[nnx.State, nnx.State]:
    """Initial parameters and buffers of the whole model; to be jitted with the plan's shardings. The numbers are the
    same on every mesh, so they are laid out afterwards."""
    _, params, buffers = nnx.split(LanguageModel(config, nnx.Rngs(jax.random.key(seed))), nnx.Param, ...)
    return params, buffers
