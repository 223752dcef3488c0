"""Folders that transformers writes go through Orogen and back to transformers."""

import json
import math

import numpy as np
import pytest
from tests.convert.synthetic import CASES, read, same, stored
from tests.infer.engines import answers, asked, engine_of

from orogen.cli import main

STEPS, PROMPT = 32, 7


@pytest.fixture
def drawn(tmp_path):
    """Writes a case's model with random weights of useful sizes, made and saved by transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    def write(case: str, dtype: str = "float32"):
        (tmp_path / "config.json").write_text(json.dumps(stored()[case]["config"]))
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in (*model.named_parameters(), *model.named_buffers()):
                noise = torch.randn(weight.shape, generator=draw)
                if "norm" in name or "ln_" in name:  # weights, and shifts of layer norms
                    weight.add_((0.2 * noise).to(weight.dtype))
                elif weight.ndim >= 2 and "A_log" not in name:
                    weight.copy_((noise / math.sqrt(weight.shape[-1])).to(weight.dtype))
                elif name.endswith(("bias", "sinks")) and "dt_" not in name:
                    weight.copy_((0.2 * noise).to(weight.dtype))
        model.save_pretrained(tmp_path / "hf")
        return without_clamp(model)

    return write


def without_clamp(model):
    """nemotron_h without the clamp of dt at time_step_min, which training never had (transformers#48989).

    Experts run one by one: torch's grouped product refuses odd widths.
    """
    model.set_experts_implementation("eager")
    for part in model.modules():
        if hasattr(part, "time_step_limit") and model.config.model_type == "nemotron_h":
            part.time_step_limit = tuple(map(float, model.config.time_step_limit))
    return model.eval()


def run(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.mark.peer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_it_wrote(drawn, tmp_path, case, dtype):
    import transformers

    before = drawn(case, dtype).state_dict()
    run("convert", "from-hf", tmp_path / "hf", tmp_path / "ours")
    run("convert", "to-hf", tmp_path / "ours", tmp_path / "back")
    assert same(read(tmp_path / "hf"), read(tmp_path / "back"))
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "back", dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.peer
@pytest.mark.parametrize("case", CASES)
def test_scores_and_greedy_decoding_are_the_same(drawn, tmp_path, case):
    import torch
    import transformers

    model = drawn(case)
    tokens = np.random.default_rng(2).integers(3, 96, (2, 37))
    np.save(tmp_path / "in.npy", tokens)
    run("score", "--checkpoint", tmp_path / "hf", "--tokens", tmp_path / "in.npy", "--out", tmp_path / "out.npz")
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["logits"], expected, atol=1e-5 * np.ptp(expected))

    run("convert", "from-hf", tmp_path / "hf", tmp_path / "ours")
    run("convert", "to-hf", tmp_path / "ours", tmp_path / "back")
    again = without_clamp(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="float32"))
    prompt = torch.tensor(tokens[:, :PROMPT])
    stops = {"eos_token_id": None, "pad_token_id": 0}
    cached = case != "nemotron_h_biased"  # a step from transformers' cache does not clamp dt, whole sequences do
    decoded = again.generate(prompt, do_sample=False, max_new_tokens=STEPS, use_cache=cached, **stops).numpy()
    np.testing.assert_array_equal(greedy(tmp_path / "ours", tokens[:, :PROMPT]), decoded)


def greedy(folder, prompt_bt: np.ndarray) -> np.ndarray:
    """The prompt and the STEPS tokens that the engine answers, from its caches: each prompt is read in two pieces."""
    from orogen.checkpoint.open import open_model

    engine = engine_of(open_model(folder), slots=len(prompt_bt), max_length=48, chunk=4, page=4, prefill_tokens=4)
    requests = [asked(tuple(map(int, prompt)), STEPS, ignore_eos=True) for prompt in prompt_bt]
    return np.concatenate([prompt_bt, answers(engine, *requests)], axis=1)
