"""The weighted mean of the parameters of several checkpoints of one model.

Averages of checkpoints from the constant part of a schedule stand in for a decay of the learning rate (Nemotron 3
Super's report: 2 to 4 points over the single checkpoints, gone once the rate decays; arXiv:1803.05407).
"""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from orogen.checkpoint import checksums
from orogen.checkpoint.folders import CONFIG
from orogen.checkpoint.leaves import dotted
from orogen.checkpoint.open import open_folder, read_model
from orogen.checkpoint.transfer import model_tensors
from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.text import model_text
from orogen.convert.config import difference
from orogen.convert.tensor_files import Spec, TensorWriter, new_folder


def average(sources: Sequence[Path], target: Path, *, weights: Sequence[float] | None = None) -> None:
    """Writes the mean of the sources' parameters, and of their routers' biases, into the Orogen folder `target`.

    sources: whatever `open_folder` opens. weights: relative; None: equal. Sums are in float64, the result in float32;
    one model and the sum are in memory at a time. The tokenizer and the rest are those of the first source. Raises
    ConfigError, and then leaves no `target`.
    """
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if len(weights) != len(sources):
        raise ConfigError(f"{len(weights)} weights for {len(sources)} checkpoints; expected one for each")
    if not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
        expected = "expected non-negative numbers, at least one of them positive, with a finite sum"
        raise ConfigError(f"the weights are {weights}; {expected}")
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(new_folder(target))  # first, so that an existing one is refused at once
        first = stack.enter_context(open_folder(sources[0]))
        words = first.tokenizer()
        totals: dict[tuple, np.ndarray] = {}
        for source, weight in zip(sources, weights, strict=True):
            with open_folder(source) as folder:
                if (field := difference(first.config, folder.config)) is not None:
                    here, there = getattr(folder.config, field), getattr(first.config, field)
                    expected = f"expected {there!r}, as {str(sources[0])!r} has it"
                    raise ConfigError(f"ModelConfig.{field} of {str(source)!r} is {here!r}; {expected}")
                own = folder.tokenizer()
                if words is not None and own is not None and own.fingerprint != words.fingerprint:
                    expected = f"expected that of {str(sources[0])!r}"
                    raise ConfigError(f"{str(source)!r} has a tokenizer of its own; {expected}")
                opened = read_model(folder, tokenizer=False)
                specs, read = model_tensors(opened.params, opened.buffers)
                for path in specs:
                    part = np.asarray(jax.device_get(read(path, ())), np.float64) * (weight / sum(weights))
                    totals[path] = totals[path] + part if path in totals else part
        wide = {dotted(path): Spec(total.shape, np.dtype(np.float32)) for path, total in totals.items()}
        with TensorWriter(scratch, wide) as writer:
            for path, total in totals.items():
                writer.write(dotted(path), total.astype(np.float32))
        if words is not None:
            words.save(scratch / "tokenizer")
        first.keep(scratch)
        write_atomically(scratch / CONFIG, model_text(first.config).encode())
        checksums.write(scratch)
