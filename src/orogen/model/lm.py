"""The language model: embedding, backbone, final norm, head, and the multi-token-prediction block.

Letters: b batch, t time, d model, v vocabulary.
"""

from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import Array

from orogen.config.model import ModelConfig
from orogen.layers.documents import Documents
from orogen.layers.embedding import Embedding, Head, logits
from orogen.layers.norm import make_norm
from orogen.model.block import Stack, repeats
from orogen.model.mtp import MTPBlock, shifted
from orogen.model.stages import Stages
from orogen.parallel.context import later
from orogen.parallel.plan import Plan


class LanguageModel(nnx.Module):
    """A pattern of residual layers between an embedding and a head, which may be one matrix (`head` is then None)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embedding = Embedding(config, rngs)
        self.backbone = Stack(repeats(config.layers.main), config, rngs)
        self.norm = make_norm(config)
        self.head = None if config.tie_word_embeddings else Head(config, rngs)
        self.mtp = MTPBlock(config, rngs) if config.layers.mtp else None
        self.mtp_depths = config.mtp_depths

    def hidden(self, tokens_bt: Array, docs: Documents, plan: Plan, replay: Any = None) -> tuple[Array, Any]:
        """The final-normed hidden state (b, t of this rank's sequence piece, d) and the layers' statistics."""
        x_btd = self.embedding(tokens_bt, docs, plan)
        x_btd, stats = self.backbone(x_btd, docs, plan, replay, ends=(True, True))
        return self.norm(x_btd, plan), stats

    def deeper(
        self, h_btd: Array, tokens_bt: Array, docs: Documents, plan: Plan, replay: Any = None
    ) -> list[tuple[Array, Any]]:
        """(hidden state, statistics) of each multi-token-prediction depth 1, 2, …; none without a block."""
        depths = []
        if self.mtp is None:
            return depths
        for depth in range(1, self.mtp_depths + 1):
            with jax.named_scope(f"mtp_{depth}"):
                # A later token keeps its own position.
                moved = docs._replace(positions_bt=later(docs.positions_bt, depth, plan))
                embedded_btd = self.embedding(later(tokens_bt, depth, plan), moved, plan)
                inside = shifted(docs, depth, plan)
                h_btd, stats = self.mtp(h_btd, embedded_btd, inside, plan, replay and replay[depth - 1])
            depths.append((h_btd, stats))
        return depths

    def logits(self, tokens_bt: Array, docs: Documents, plan: Plan) -> Array:
        """Logits (b, t, v) float32 of the next token, whole on every rank."""
        h_btd, _ = self.hidden(tokens_bt, docs, plan)
        return self.project(plan.gather(h_btd, "sequence"), plan)

    def project(self, h_btd: Array, plan: Plan) -> Array:
        """Logits (b, t, v) float32 of final hidden states, whole on every rank."""
        return logits(h_btd, self.head_matrix(plan), plan)

    def head_matrix(self, plan: Plan) -> Array:
        """The head (d, this rank's part of v), whole along d; the embedding's rows as columns if they are tied."""
        return plan.weight(self.embedding.weight).T if self.head is None else plan.weight(self.head.weight)


class Built(NamedTuple):
    """A model taken apart: its static graph, and its parameters and buffers as abstract arrays with axis names. If it
    is cut into `stages`, parameters and buffers are as those keep them."""

    graph: nnx.GraphDef
    params: nnx.State
    buffers: nnx.State
    stages: Stages | None = None


def build(config: ModelConfig, stages: Stages | None = None) -> Built:
    """The model of `config`, whole or cut into `stages`, without allocating anything."""
    model = jax.eval_shape(lambda: LanguageModel(config, nnx.Rngs(0)))
    graph, *states = nnx.split(model, nnx.Param, ...)
    if stages is not None:
        states = [jax.eval_shape(stages.split, state) for state in states]
    return Built(graph, *states, stages)


def initial_state(config: ModelConfig, seed: int | Array, stages: Stages | None = None) -> tuple[nnx.State, nnx.State]:
    """Parameters and buffers; to be jitted with the plan's shardings. The same numbers on every mesh."""
    _, params, buffers = nnx.split(LanguageModel(config, nnx.Rngs(jax.random.key(seed))), nnx.Param, ...)
    return (params, buffers) if stages is None else (stages.split(params), stages.split(buffers))
