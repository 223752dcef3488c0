"""A tiny hybrid's recipe, runs of it, and their metrics."""

from pathlib import Path

from orogen.config.load import load
from orogen.report.metrics import read_metrics
from orogen.train.pretraining import PRETRAINING
from orogen.train.run import train

MODEL = {
    "pattern": "'ME/*E'",
    "vocab_size": 259,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "ssm_state_size": 4,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "moe_latent_size": 8,
}

STEPS = 24


TIMED = ("step_ms", "tokens_per_second", "compile_seconds", "evaluate_seconds", "save_seconds", "start_seconds")


def write_recipe(folder: Path) -> Path:
    """A recipe, in `folder`, that trains a tiny hybrid on a folder of text."""
    (folder / "text").mkdir()
    for number in range(40):
        line = f"document {number}: " + " ".join(str(number * k % 97) for k in range(1, 60)) + "\n"
        (folder / "text" / f"{number:02}.txt").write_text(line)
    lines = [f"ModelConfig.{name} = {value}" for name, value in MODEL.items()]
    lines += [
        f"DataConfig.corpus = '{folder / 'text'}'",
        "DataConfig.tokenizer = 'byte'",
        "DataConfig.heldout_fraction = 0.2",
        "DataConfig.tuning_fraction = 0.0",
        f"TrainConfig.steps = {STEPS}",
        "TrainConfig.batch_size = 2",
        "TrainConfig.sequence_length = 32",
        "TrainConfig.seed = 1",
        "TrainConfig.evaluate_every = 10",
        "TrainConfig.evaluate_rows = 4",
        "TrainConfig.checkpoint_every = 8",
        "OptimizerConfig.learning_rate = 3e-3",
        "OptimizerConfig.schedule = 'constant'",
    ]
    file = folder / "tiny.gin"
    file.write_text("\n".join(lines) + "\n")
    return file


def run(recipe: Path, run_dir: Path, *bindings: str, resume: bool = False):
    return train(*load([recipe], bindings), run_dir, PRETRAINING, resume=resume, log=lambda line: None)


def curve(run_dir: Path) -> list[dict]:
    """The metrics of every step, without timings."""
    return [{k: v for k, v in record.items() if k not in TIMED} for record in read_metrics(run_dir)]
