"""transformers' Nemotron-H on a GPU, with weights and tokens from files, as a process that answers with loss and times.

`python -m orogen.bench.torch_model` is that process (see orogen.bench.worker). Letters: b batch, t time, v vocabulary.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from orogen.bench.worker import seconds_a_run, serve

WARM_UP = 2
# Fast kernels that transformers imports from other packages, and the module of each; it replaces missing ones by plain
# torch.
FUNCTIONS = {
    "causal_conv1d_fn": "causal_conv1d",
    "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
}


def kernels() -> dict[str, str]:
    """The module of each fast kernel, or why it is missing."""
    found = {}
    for function, module in FUNCTIONS.items():
        try:
            getattr(importlib.import_module(module), function)
            found[function] = module
        except (ImportError, AttributeError) as error:
            found[function] = f"missing, plain torch instead ({error})"
    return found


def prepare(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """Reads `folder` (weights in Hugging Face's format) and `tokens` (int32 (b, t), .npy). Answers "loss" with the mean
    nats per next token, and {"time": steps} with the seconds and peak GB of forward and backward passes in bfloat16."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = transformers.NemotronHForCausalLM.from_pretrained(
        settings["folder"], dtype=torch.bfloat16, attn_implementation="sdpa", output_loading_info=True
    )
    model, loading = loaded
    faults = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if faults:
        raise RuntimeError(f"transformers did not load the weights as written: {faults}")
    model = model.to(device).eval()  # training mode needs a compiled convolution; gradients are the same
    if device == "cuda":
        model.set_experts_implementation("grouped_mm")
    tokens_bt = torch.from_numpy(np.load(Path(settings["tokens"]))).to(device, torch.int64)

    def loss() -> Any:
        logits_btv = model(input_ids=tokens_bt, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits_btv.flatten(0, 1).float(), tokens_bt[:, 1:].flatten())

    def step() -> Any:
        """Starts a forward and backward pass. Returns an event that marks its end; None on a CPU, where it is over."""
        loss().backward()
        for parameter in model.parameters():
            parameter.grad = None
        return torch.cuda.current_stream().record_event() if device == "cuda" else None

    facts = {
        "torch": torch.__version__, "transformers": transformers.__version__, "kernels": kernels(),
        "experts": getattr(model.config, "_experts_implementation", None), "attention": "sdpa",
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    return facts, lambda question: _answer(question, loss, step, device)


def _answer(question: Any, loss: Callable[[], Any], step: Callable[[], Any], device: str) -> dict[str, Any]:
    import torch  # pyright: ignore[reportMissingImports]

    if question == "loss":
        with torch.no_grad():
            answer: dict[str, Any] = {"loss": float(loss())}
    else:
        for _ in range(WARM_UP):
            wait(step())
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_a_run(step, wait, question["time"])
        peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
        answer = {"seconds": seconds, "gb": peak}
    if device == "cuda":
        torch.cuda.empty_cache()  # another program uses the GPU next
    return answer


def wait(event: Any) -> None:
    """Returns once the device has finished all work before the event."""
    if event is not None:
        event.synchronize()


if __name__ == "__main__":
    serve(prepare)
