"""Greedy captions with caches against one pass over whole rows, and prompts that are too long."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from tests.helpers import hybrid
from tests.model.small import randomised

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig
from orogen.data.images import Placed, with_images
from orogen.data.packing import Batch
from orogen.data.vocabulary import byte_tokenizer
from orogen.layers.documents import Documents
from orogen.model.lm import build
from orogen.parallel.plan import single_device_plan
from orogen.train.sides import with_open_gates
from orogen.vision.describe import Captioner, Prompt
from orogen.vision.examples import FIRST

TOKENIZER = byte_tokenizer()
MODEL = hybrid(
    pattern="Mx*g-", mtp_depths=0, vocab_size=TOKENIZER.vocab_size, image_feature_size=5, image_features=7,
    resampler_latents=3, resampler_layers=1, retrieved_captions=2, caption_tokens=4,
)  # fmt: skip
TOKENS = 6


@pytest.fixture(scope="module")
def opened():
    built, rng = build(MODEL), np.random.default_rng(0)
    params, buffers = with_open_gates(randomised(built.params, rng)), randomised(built.buffers, rng)
    return Opened(MODEL, single_device_plan(PlanConfig(), MODEL), built, params, buffers, TOKENIZER)


def image(seed):
    return np.random.default_rng(seed).normal(size=(MODEL.image_features, MODEL.image_feature_size)).astype(np.float32)


def a_prompt(*ids, captions=()):
    """Its first image has these captions; others have none."""
    numbers = [one - FIRST for one in ids if one >= FIRST]
    return Prompt(ids, {number: image(number) for number in numbers}, {numbers[0]: captions})


EOS, PAD = TOKENIZER.eos_id, TOKENIZER.pad_id
NONE = [PAD] * 4
AB, CDEF, XY = (TOKENIZER.encode_inside(text).tolist() for text in ("ab", "cdef", "xy"))
CHUNKS = {(): [NONE, NONE], ("ab", "cdefg"): [[*AB, EOS, PAD], CDEF], ("xy",): [[*XY, EOS, PAD], NONE]}
PROMPTS = [
    a_prompt(TOKENIZER.bos_id, FIRST, 65, 66, 67, 10, FIRST + 1, *range(70, 84)),
    a_prompt(TOKENIZER.bos_id, FIRST + 2, captions=("ab", "cdefg")),
    a_prompt(TOKENIZER.bos_id, FIRST + 2, captions=("xy",)),
    a_prompt(TOKENIZER.bos_id, 80, FIRST + 3, 97, 10),
]


def test_captions_of_unequal_prompts_are_the_greedy_ones_of_whole_rows(opened):
    captioner = Captioner(opened, TOKENIZER.pad_id, tokens=TOKENS)
    found_bt = np.asarray(captioner._program(opened.params, opened.buffers, captioner._batch(PROMPTS)))
    length = max(len(prompt.ids) for prompt in PROMPTS) + TOKENS
    batch = Batch(*(np.zeros((len(PROMPTS), length), np.int32) for _ in range(3)), np.zeros(()))  # ends with padding
    placed = []
    for row, (prompt, found_t) in enumerate(zip(PROMPTS, found_bt, strict=True)):
        ids = np.array([*prompt.ids, *found_t])
        stands_t = np.flatnonzero(ids >= FIRST)
        numbers = [int(ids[t]) - FIRST for t in stands_t]
        chunks = [np.array(CHUNKS[prompt.captions.get(number, ())], np.int32) for number in numbers]
        features = [prompt.features[number] for number in numbers]
        placed.append([Placed(*one) for one in zip(stands_t.tolist(), features, chunks, strict=True)])
        batch.tokens_bt[row, : len(ids)] = np.where(ids >= FIRST, TOKENIZER.pad_id, ids)
        batch.segments_bt[row, : len(ids)] = 1
        batch.positions_bt[row, : len(ids)] = np.arange(len(ids))
    batch = with_images(batch, placed, room=2, shape=(MODEL.image_features, MODEL.image_feature_size), caption_tokens=8)

    @jax.jit
    def logits(params, buffers, batch):
        model, plan = nnx.merge(opened.built.graph, params, buffers), opened.plan
        docs = Documents(batch.segments_bt, batch.positions_bt)
        return model.project(model.hidden(batch.tokens_bt, docs, plan, model.given_images(batch.extras, plan))[0], plan)

    best_bt = np.asarray(logits(opened.params, opened.buffers, batch))[..., : TOKENIZER.vocab_size].argmax(-1)
    for prompt, best_t, found_t in zip(PROMPTS, best_bt, found_bt, strict=True):
        assert TOKENIZER.eos_id not in found_t  # after which nothing is predicted
        start = len(prompt.ids) - 1
        assert best_t[start : start + TOKENS].tolist() == found_t.tolist()
    assert len({tuple(found_t) for found_t in found_bt}) == len(PROMPTS)


def test_a_prompt_beyond_the_learned_positions_is_refused(opened):
    short = opened._replace(config=dataclasses.replace(MODEL, learned_positions=20))
    with pytest.raises(ConfigError, match="may have 27 tokens; expected at most ModelConfig.learned_positions = 20"):
        Captioner(short, TOKENIZER.pad_id, tokens=TOKENS).captions(PROMPTS)
