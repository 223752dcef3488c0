"""Engines of tiny random models, and what the training forward makes of whole texts. Letters: b texts, t time."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tests.model.small import config, randomised

from orogen.checkpoint.open import Opened
from orogen.config.engine import EngineConfig
from orogen.config.plan import PlanConfig
from orogen.cost.assemble import assemble
from orogen.data.tokenizer import Tokenizer
from orogen.infer.engine import Engine
from orogen.infer.request import Chosen, Output, Request, Sampling
from orogen.layers.documents import documents
from orogen.model.lm import build
from orogen.parallel.placement import shardings

GREEDY = Sampling(temperature=0)
LATENT: dict[str, Any] = {
    "rope_theta": 100.0, "q_lora_rank": 6, "kv_lora_rank": 7, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}  # fmt: skip


def opened(pattern: str, plan: PlanConfig | None = None, tokenizer: Tokenizer | None = None, **changes: Any) -> Opened:
    """A model of random weights on a plan."""
    model = config(pattern=pattern, mtp_depths=int("/" in pattern), **changes)
    laid, built = assemble(model, plan or PlanConfig())
    whole, rng = build(model), np.random.default_rng(0)
    states = (built.laid(jax.tree.map(jnp.asarray, randomised(s, rng))) for s in (whole.params, whole.buffers))
    params, buffers = (jax.device_put(state, shardings(state, laid)) for state in states)
    return Opened(model, laid, built, params, buffers, tokenizer)


def changed(opened: Opened, path: tuple[str, ...], function: Any) -> Opened:
    """The model with one parameter changed."""
    flat = dict(nnx.to_flat_state(opened.params))
    flat[path] = flat[path].replace(function(flat[path].get_value()))
    return opened._replace(params=nnx.from_flat_state(list(flat.items())))


@functools.cache
def _forward(graph: Any, plan: Any) -> Any:
    @jax.jit
    def logits(params, buffers, tokens_bt, segments_bt):
        return nnx.merge(graph, params, buffers).logits(tokens_bt, documents(segments_bt), plan)

    return logits


def logits_of(opened: Opened, texts: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Logits (b, length, v) of whole texts, without a cache."""
    tokens_bt = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        tokens_bt[row, : len(text)] = text
    segments_bt = (np.arange(length) < np.array([len(text) for text in texts])[:, None]).astype(np.int32)
    run = _forward(opened.built.graph, opened.plan)
    return np.asarray(run(opened.params, opened.buffers, tokens_bt, segments_bt))


def asked(prompt: Iterable[int], tokens: int, sampling: Sampling = GREEDY, **more: Any) -> Request:
    """A request that reports log-probabilities."""
    return Request(prompt=tuple(prompt), max_tokens=tokens, sampling=sampling, **{"logprobs": 0, **more})


def random_prompt(seed: int, length: int, size: int = 23) -> tuple[int, ...]:
    """Tokens of a vocabulary of `size`."""
    return tuple(np.random.default_rng(seed).integers(0, size, length).tolist())


def ids(outputs: Iterable[Output]) -> list[int]:
    """The tokens of one request."""
    return [token.id for token in chosen(outputs)]


def chosen(outputs: Iterable[Output]) -> list[Chosen]:
    """The same with what was reported."""
    return [token for output in outputs for token in output.tokens]


def text(outputs: Iterable[Output]) -> str:
    """The text of one request."""
    return "".join(output.text for output in outputs)


def answers(engine: Engine, *requests: Request) -> list[list[int]]:
    """The tokens of requests that are answered together."""
    return [ids(outputs) for outputs in engine.run(requests)]


def check_greedy(opened: Opened, requests: Sequence[Request], found: Sequence[Sequence[Output]], length: int) -> None:
    """Each token is the most likely one after the whole text before it, and its log-probability that of the text."""
    texts = [(*request.prompt, *ids(outputs)) for request, outputs in zip(requests, found, strict=True)]
    logits_btv = logits_of(opened, texts, length)
    for request, outputs, text, logits_tv in zip(requests, found, texts, logits_btv, strict=True):
        assert len(text) == len(request.prompt) + request.max_tokens
        here_tv = logits_tv[len(request.prompt) - 1 : len(text) - 1].astype(np.float64)
        assert here_tv.argmax(-1).tolist() == ids(outputs)
        expected = here_tv.max(-1) - np.log(np.exp(here_tv).sum(-1))
        np.testing.assert_allclose([token.logprob for token in chosen(outputs)], expected, atol=2e-5)


# Engines of one form of model and one config run the programs of the first of them: weights are their arguments. Those
# of the forms asked for last are kept, as they hold their first engine's weights and tokenizer.
PROGRAMS, MOST_FORMS = ("reader", "decoder", "copy", "write"), 8
_compiled: dict[Any, dict[str, Any]] = {}


def engine_of(opened: Opened, *, own: bool = False, **changes: Any) -> Engine:
    """An engine of few slots and short texts: two pages of a row, so that there are few programs. own: with programs of
    its own, which its `traces` count."""
    sizes = {"slots": 2, "max_length": 32, "page": 8, "chunk": 8, "prefill_tokens": 16, "steps": 3, "snapshots": 4}
    engine = Engine(opened, EngineConfig(**(sizes | changes)))
    if own:
        return engine
    opened, plan = engine.opened, engine.opened.plan
    form = (
        opened.config, opened.built.graph, plan.config, plan.recipe, plan.recipes, plan.decode_kernels, engine.config,
        id(opened.tokenizer),  # of a tokenizer that lives, since its programs hold it
    )  # fmt: skip
    _compiled[form] = _compiled.pop(form, None) or {name: getattr(engine.programs, name) for name in PROGRAMS}
    if len(_compiled) > MOST_FORMS:
        del _compiled[next(iter(_compiled))]
    vars(engine.programs).update(_compiled[form])
    return engine


def leaked(engine: Engine) -> list[int]:
    """Per data rank, the pages and snapshots that nobody has and nobody could have, of an idle engine."""
    assert not engine.busy
    found = []
    for rank in engine.scheduler.ranks:
        pages = rank.pages.count - rank.pages.free - rank.prefix.evictable_pages if rank.pages else 0
        kept, evictable = rank.snapshots, rank.prefix.evictable_snapshots
        found += [pages, kept.count - kept.free - evictable if kept else 0]
    return found
