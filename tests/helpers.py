"""Small models and runs that several tests share."""

import contextlib
import hashlib
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import OptimizerConfig, RunConfig, TrainConfig

# Every layer type, repetitions, an MTP block at two depths; sizes unequal, and divisible by 2, 3, 4, 6 and 8 where a
# plan splits them. Two key heads and two Mamba groups: fewer than the ranks of a wide tensor axis.
HYBRID: dict = {
    "pattern": "ME*-ME*-M/*E",
    "vocab_size": 96,
    "hidden_size": 48,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 72,
    "mamba_num_heads": 24,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "ssm_state_size": 5,
    "chunk_size": 8,
    "n_routed_experts": 24,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 24,
    "moe_latent_size": 24,
    "routed_scaling_factor": 2.5,
    "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.001,
    "mtp_depths": 2,
}


def hybrid(**changes) -> ModelConfig:
    """The small hybrid, with `changes`."""
    return ModelConfig(**{**HYBRID, **changes})


def run_config(model: ModelConfig | None = None, *, plan: dict | None = None, data=None, **train) -> RunConfig:
    """A run of `model` on `plan`, with a constant learning rate."""
    settings = {"steps": 10, "batch_size": 4, "sequence_length": 24, "seed": 3, **train}
    return RunConfig(
        model=model or hybrid(),
        plan=PlanConfig(**(plan or {})),
        data=data,
        train=TrainConfig(**settings),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant"),
    )


@contextlib.contextmanager
def child_process(command: list[str], **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """A process and its output as text. It is killed when the body ends, or a test that fails would wait for it."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **settings) as process:
        try:
            yield process
        finally:
            process.kill()


def implementations(names: Iterable[str]) -> list:
    """As parameters of a test, where those that need a GPU are skipped without one."""
    reason = "needs a GPU, and JAX_PLATFORMS=cuda,cpu in front of the command"
    needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason=reason)
    on_gpu = lambda name: name.startswith("triton") and not name.endswith("interpreted")  # noqa: E731
    return [pytest.param(name, marks=needs_gpu if on_gpu(name) else ()) for name in sorted(names)]


# A model in gin files, and a run of it on bytes, with the folder of its corpus to fill in.
MODEL = """
ModelConfig.pattern = '*-'
ModelConfig.vocab_size = 259
ModelConfig.hidden_size = 12
ModelConfig.num_attention_heads = 6
ModelConfig.num_key_value_heads = 2
ModelConfig.head_dim = 5
ModelConfig.intermediate_size = 14
"""
RUN = (
    MODEL
    + """
DataConfig.corpus = {corpus!r}
DataConfig.tokenizer = 'byte'
DataConfig.heldout_fraction = 0.3
DataConfig.tuning_fraction = 0.0
TrainConfig.steps = 2
TrainConfig.batch_size = 4
TrainConfig.sequence_length = 24
TrainConfig.seed = 0
OptimizerConfig.learning_rate = 1e-3
"""
)


def write_recipe(folder: Path) -> Path:
    """The gin file of such a run, with twenty short texts."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(20):
        (corpus / f"{number}.txt").write_text(f"document {number}\n")
    file = folder / "recipe.gin"
    file.write_text(RUN.format(corpus=str(corpus)))
    return file


def bound(*bindings: str) -> list[str]:
    """As arguments of a command."""
    return [word for binding in bindings for word in ("--gin_bindings", binding)]


several_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs several devices, as a CPU simulates them")


def listing(folder: Path) -> dict[str, str]:
    """Every path below `folder`, with the hash of its bytes."""
    digest = lambda p: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"  # noqa: E731
    return {str(path.relative_to(folder)): digest(path) for path in folder.rglob("*")}
