"""What the settings leave of a distribution, against the logits processors of transformers."""

import jax
import numpy as np
import pytest

from orogen.infer.knobs import features_of, knobs_of
from orogen.infer.request import Request, Sampling
from orogen.infer.restrict import restricted
from orogen.infer.sampling import _shaped, history_of

pytestmark = pytest.mark.peer

V = 97
SETTINGS = [
    {"repetition_penalty": 1.3},
    {"top_k": 7},
    {"top_p": 0.83},
    {"min_p": 0.07},
    {"repetition_penalty": 0.8, "temperature": 0.7, "top_k": 30, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_probabilities_are_those_of_transformers(settings):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    random = np.random.default_rng(len(settings))
    logits_bv = np.float32(random.normal(size=(20, V)) * 3)
    texts = random.integers(0, V, (20, 9)).tolist()
    sampling = Sampling(seed=0, **settings)
    processors = transformers.LogitsProcessorList()
    kinds = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    processors.extend(kind(settings[name]) for name, kind in kinds.items() if name in settings)
    peer_bv = processors(torch.tensor(texts), torch.tensor(logits_bv)).softmax(-1).numpy()

    requests = [Request(prompt=tuple(text[:4]), max_tokens=9, sampling=sampling) for text in texts]
    features = features_of(requests)
    knobs = knobs_of(requests, features)
    rows = history_of(requests, features, vocab_size=V, generated=[text[4:] for text in texts])

    def left(logits_bv, knobs, rows):
        shaped_bv = _shaped(logits_bv, knobs, rows, features)
        scaled_bv = (shaped_bv - shaped_bv.max(-1, keepdims=True)) / knobs.temperature_b[:, None]
        return jax.nn.softmax(restricted(scaled_bv, knobs.top_k_b, knobs.top_p_b, knobs.min_p_b))

    np.testing.assert_allclose(jax.jit(left)(logits_bv, knobs, rows), peer_bv, rtol=2e-5, atol=1e-7)
