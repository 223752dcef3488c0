"""The summary of a finished run: baselines, samples and the report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orogen.checkpoint.open import Opened, open_model
from orogen.config.files import write_atomically
from orogen.config.run import RunConfig
from orogen.data.packing import trained_text
from orogen.evaluate import ngram
from orogen.infer.generate import generate
from orogen.model.count import count
from orogen.report.lost import jumps, read_lost
from orogen.report.metrics import read_metrics
from orogen.report.page import write_report
from orogen.train.pretraining import batches_until
from orogen.train.run import Trained

SAMPLE_TEMPERATURE, SAMPLE_TOP_P = 0.7, 0.9


def summarise(trained: Trained, config: RunConfig, text: str, run_dir: Path) -> dict[str, Any]:
    """Writes samples.txt and report.html; returns the headline numbers."""
    samples = sample_text(open_model(run_dir), config)
    write_atomically(run_dir / "samples.txt", samples.encode())
    compared = baselines(trained, config, jumps(read_lost(run_dir)))
    environment = json.loads((run_dir / "env.json").read_text())
    environment["parameters"] = count(config.model)
    report = write_report(
        run_dir, title=run_dir.name, config_text=text, baselines=compared, samples=samples, environment=environment
    )
    last = read_metrics(run_dir)[-1]
    keys = (
        "step", "loss", "whole_heldout_loss", "whole_heldout_bits_per_byte", "whole_heldout_preference_loss",
        "whole_heldout_accuracy",
    )  # fmt: skip
    facts = {key: last[key] for key in keys if key in last}
    return {**facts, **{f"{name} bits per byte": value for name, value in compared.items()}, "report": str(report)}


def baselines(trained: Trained, config: RunConfig, skips: Mapping[int, dict[str, Any]]) -> dict[str, float]:
    """Bits per byte of the held-out documents under an n-gram fitted on the training text, and under zlib and xz.
    skips: where the data went on after roll-backs."""
    order = config.train.ngram_order
    if not order:
        return {}
    heldout = list(trained.corpus.splits["heldout"].texts())
    batches = batches_until(config, trained.corpus, int(trained.state.step), skips)
    seen = trained_text(batches, trained.corpus.tokenizer)
    order = min(order, len(seen))  # a run of a few bytes has no longer n-grams
    score = ngram.bits_per_byte(ngram.fit(seen, order), heldout)
    return {f"Witten-Bell {order}-gram": score, **ngram.compressed_bits_per_byte(heldout)}


def sample_text(opened: Opened, config: RunConfig) -> str:
    """Continuations of the run's prompts, each under a line that shows the prompt."""
    prompts = config.train.sample_prompts
    texts = generate(
        opened,
        prompts,
        tokens=config.train.sample_tokens,
        temperature=SAMPLE_TEMPERATURE,
        top_p=SAMPLE_TOP_P,
        seed=config.train.seed,
    )
    blocks = [f"=== prompt {prompt!r}\n{prompt}{text}\n" for prompt, text in zip(prompts, texts, strict=True)]
    return "\n".join(blocks)
