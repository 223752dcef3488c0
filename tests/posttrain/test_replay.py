"""Router replay: what an engine records, and what the trainer makes of it. Letters: b texts, t time, l layers of
experts, k experts of a token."""

import dataclasses

import jax
import numpy as np
import pytest
from tests.helpers import hybrid, run_config
from tests.posttrain.test_rl import RECIPE, run

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.config.rl import EnvironmentConfig, RLConfig
from orogen.cost.assemble import assemble
from orogen.infer.engine import Engine
from orogen.infer.request import Request, Sampling
from orogen.model.lm import initial_state
from orogen.posttrain.likelihood import Likelihoods
from orogen.posttrain.samples import Sample, Track, batch_of

MODEL = hybrid(pattern="ME*E", mtp_depths=0)
RL = RLConfig(
    environments=(EnvironmentConfig(name="a", kind="workplace"),), prompts=1, samples=2, max_tokens=9, template="plain",
    router_replay=True, importance="none", sequence_error=None,
)  # fmt: skip
# A run of one rollout with two updates, by weights that stay as they are.
EXPERTS = """
ModelConfig.pattern = '*E'
ModelConfig.n_routed_experts = 8
ModelConfig.num_experts_per_tok = 2
ModelConfig.moe_intermediate_size = 10
ModelConfig.routed_scaling_factor = 50.0
OptimizerConfig.learning_rate = 1e-12
TrainConfig.router_bias_update_rate = 0.5
TrainConfig.steps = 2
DataConfig.heldout_fraction = 0.0
"""
LENGTHS = (20, 7), (5, 9), (33, 1)  # tokens of prompts and answers


@pytest.fixture(scope="module")
def written():
    """A trainer's scorer and weights, and samples that an engine wrote, with their experts."""
    config = dataclasses.replace(run_config(MODEL, batch_size=2, sequence_length=48), rl=RL)
    plan, built = assemble(MODEL, config.plan)
    params, buffers = map(built.laid, jax.jit(lambda: initial_state(MODEL, 1))())
    params = jax.tree.map(lambda a: 5 * a if a.ndim > 1 else a, params)  # so that experts differ
    settings = EngineConfig(
        slots=2, max_length=48, page=8, chunk=16, prefill_tokens=16, steps=4, report_experts=True, prefix_cache=False,
        written_out=False,
    )  # fmt: skip
    rng, requests = np.random.default_rng(0), []
    for count, most in LENGTHS:
        prompt = tuple(map(int, rng.integers(0, MODEL.vocab_size, count)))
        requests.append(Request(prompt=prompt, max_tokens=most, sampling=Sampling(seed=count), logprobs=0))
    found = Engine(Opened(MODEL, plan, built, params, buffers, None), settings).run(requests)
    return Likelihoods(config, built), params, buffers, [sample_of(*one) for one in zip(requests, found, strict=True)]


def sample_of(request, outputs):
    track = Track.of_prompt(request.prompt)
    tokens = [token for output in outputs for token in output.tokens]
    track.add([token.id for token in tokens], [token.logprob for token in tokens])
    track.routed(np.concatenate([output.experts for output in outputs]))
    return Sample("a", 0, 0, "", "", [track], reward=1.0)


def packed(samples, score, rl=RL):
    """The batch, and log-probabilities (b, t) as `score` gives them for it."""
    kept = {}

    def keep(batch, tracks, at):
        kept["found"] = score(batch)
        return kept["found"]

    batch, mismatch = batch_of(samples, rl, keep, reference=None, shape=(2, 48), pad_id=0)
    return batch, kept["found"], mismatch


def with_other_biases(buffers):
    """Correction biases that change which experts are chosen, and no weight of any."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda b: b + rng.normal(0, 0.2, b.shape).astype(np.float32), buffers)


def test_an_engine_tells_the_experts_of_every_token_that_it_reads(written):
    *_, samples = written
    shapes = [sample.tracks[0].experts.shape for sample in samples]
    assert shapes == [(prompt + answer - 1, 2, MODEL.num_experts_per_tok) for prompt, answer in LENGTHS]
    for sample in samples:
        chosen = np.sort(sample.tracks[0].experts, -1)
        assert chosen.min() >= 0 and chosen.max() < MODEL.n_routed_experts and (np.diff(chosen) > 0).all()


def test_with_replay_routing_that_would_have_flipped_does_not_change_log_probabilities(written):
    """Between rollout and update, correction biases may change. They decide nothing but the choice of experts: routed
    as in the rollout, each token has the rollout's log-probability up to rounding; routed anew, another."""
    scorer, params, buffers, samples = written
    moved = with_other_biases(buffers)
    _, _, replayed = packed(samples, lambda batch: scorer.of(params, moved, batch))
    _, _, anew = packed(samples, lambda batch: scorer.of(params, moved, batch._replace(extras={})))
    assert replayed.tokens == sum(answer for _, answer in LENGTHS)
    assert replayed.largest < 2e-5 and anew.largest > 0.05


def test_tokens_without_a_record_choose_for_themselves(written):
    scorer, params, buffers, samples = written
    moved = with_other_biases(buffers)
    blank = lambda batch: batch._replace(extras={n: np.full_like(x, -1) for n, x in batch.extras.items()})  # noqa: E731
    _, one, _ = packed(samples, lambda batch: scorer.of(params, moved, blank(batch)))
    _, other, _ = packed(samples, lambda batch: scorer.of(params, moved, batch._replace(extras={})))
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_later_turns_add_the_experts_of_new_tokens_alone():
    track = Track.of_prompt([1, 2])
    track.add([3], [-1.0], [4])
    track.routed(np.zeros((2, 1, 1), np.int16))
    track.add([5])
    track.routed(np.ones((4, 1, 1), np.int16))
    assert track.experts is not None and track.experts.ravel().tolist() == [0, 0, 1, 1]
    assert track.versions == [0, 0, 4, 0]


def test_samples_without_experts_are_refused(written):
    *_, samples = written
    bare = [dataclasses.replace(samples[0], tracks=[dataclasses.replace(samples[0].tracks[0], experts=None)])]
    with pytest.raises(ValueError, match="expected an engine that reports them"):
        batch_of(bare, RL, lambda *_: np.zeros(()), reference=None, shape=(1, 48), pad_id=0)


def test_the_gradient_s_pass_replays_too(tmp_path):
    """Of two updates per rollout, the first moves nothing but correction biases: the second one's pass has the
    rollout's log-probabilities all the same. (Without replay, they differ by more than 0.001.)"""
    file = tmp_path / "rl.gin"
    dropped = (
        "ModelConfig.intermediate",
        "TrainConfig.evaluate",
        *(line.split(" = ")[0] for line in EXPERTS.strip().splitlines()),
    )
    kept = [line for line in RECIPE.splitlines() if not line.startswith(dropped)]
    file.write_text("\n".join(kept) + EXPERTS)
    _, lines = run(file, tmp_path / "run", "RLConfig.router_replay = True")
    assert [line["step"] for line in lines] == [1, 2] and all(0 < line["gap"] < 1e-4 for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_cache": True}, "EngineConfig.report_experts is True; expected False with exact or prefix_cache"),
        ({"slots": 2}, "EngineConfig.report_experts is True; expected False without experts"),
    ],
)
def test_engines_that_cannot_report(changes, message):
    plan, built = assemble(hybrid(pattern="-*", mtp_depths=0), run_config().plan)
    fields = {"max_length": 32, "page": 8, "chunk": 16, "report_experts": True, "prefix_cache": False, **changes}
    with pytest.raises(ConfigError, match=message):
        Engine(Opened(hybrid(pattern="-*", mtp_depths=0), plan, built, None, None, None), EngineConfig(**fields))
