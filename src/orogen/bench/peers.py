"""transformers' Nemotron-H in PyTorch, in its own process, which takes one training step per request.

`python -m orogen.bench.peers` is that process: it reads the sizes, answers with its facts, and then answers each
request with the seconds of one step.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from orogen.bench.worker import Worker, serve
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig

PEERS = ("torch",)
# Fields of ModelConfig that transformers' config has under the same name.
SHARED_FIELDS = (
    "vocab_size", "hidden_size", "layer_norm_epsilon", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "chunk_size",
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    "moe_latent_size", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group",
)  # fmt: skip


class Seconds(NamedTuple):
    """The duration of one step: wall time, and processor time of all threads."""

    wall: float
    cpu: float


def require_peer(name: str) -> None:
    """Raises ConfigError unless the peer is known and installed."""
    if name not in PEERS:
        raise ConfigError(f"--peer is {name!r}; expected one of {', '.join(PEERS)}")
    missing = [package for package in ("torch", "transformers") if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"--peer {name}: {' and '.join(missing)} not installed; expected the extra `peer` (orogen[peer])"
        )


class Peer:
    """A process that trains the peer's model of `config` with AdamW on a fixed random batch. Use as a context manager.

    facts: its versions, threads and number of parameters.
    """

    def __init__(self, config: ModelConfig, *, batch_size: int, sequence_length: int, threads: int):
        fields = {name: getattr(config, name) for name in SHARED_FIELDS if getattr(config, name) is not None}
        sizes = {
            "model": {**fields, "hybrid_override_pattern": config.layers.main},
            "batch_size": batch_size, "sequence_length": sequence_length, "threads": threads,
        }  # fmt: skip
        environment = {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
        self._worker = Worker("orogen.bench.peers", sizes, environment)
        self.facts = self._worker.facts

    def step(self) -> Seconds:
        """Runs one training step."""
        return Seconds(**self._worker.ask("step"))

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.close()


def _prepare(sizes: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """The process's side, for `serve`: the peer's facts, and a function that times one training step."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(sizes["threads"])
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(**sizes["model"])
    model = transformers.NemotronHForCausalLM._from_config(config, attn_implementation="sdpa").float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    tokens_bt = torch.randint(config.vocab_size, (sizes["batch_size"], sizes["sequence_length"]))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits_btv = model(input_ids=tokens_bt, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits_btv.flatten(0, 1), tokens_bt[:, 1:].flatten())
        loss.backward()
        optimizer.step()

    facts = {
        "torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    return facts, lambda _: timed(step)._asdict()


def timed(step: Any) -> Seconds:
    """Seconds that calling `step` takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    serve(_prepare)
