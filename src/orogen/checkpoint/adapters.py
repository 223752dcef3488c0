"""Low-rank adapters of a checkpoint: fresh ones beside its weights, and those of a run in PEFT's layout."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save

from orogen.checkpoint.folders import ExtendedFolder, Folder, RunFolder
from orogen.checkpoint.leaves import leaves_of
from orogen.checkpoint.open import open_folder
from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.lora import LoraConfig, adapted, kinds_in
from orogen.config.plan import PlanConfig
from orogen.config.precision import GROUPS
from orogen.convert import names
from orogen.convert.config import family_of
from orogen.convert.tensor_files import new_folder
from orogen.layers.adapter import FACTORS, WEIGHT, is_factor
from orogen.model.lm import Built, build, initial_state
from orogen.parallel import placement
from orogen.parallel.plan import Plan, single_device_plan

A, B = FACTORS
# The modules of transformers' class where their names differ from those of the family's tensors.
RENAMED = {"nemotron_h": ("backbone.", "model.")}
UNKNOWN = {
    GROUPS["routed"]: "since transformers keeps experts in one array",
    ("mamba_out",): "which PEFT refuses, since fused kernels do not call Mamba's out_proj",
}
MERGE = "to-hf, which adds the adapters to the weights"


def with_adapters(folder: Folder, lora: LoraConfig, *, seed: int) -> Folder:
    """The folder of the same model with fresh adapters, which do not change its outputs yet. Raises ConfigError if the
    model has no weight for them."""
    return _WithAdapters(folder, adapted(folder.config, lora), seed)


class _WithAdapters(ExtendedFolder):
    """A folder whose weights get freshly drawn factors."""

    def read(self, built: Built, plan: Plan, dtype: str) -> tuple[nnx.State, nnx.State]:
        """See `Folder.read`. The factors are float32."""
        params, buffers = self.inner.read(build(self.inner.config, built.layout, built.vocab_rows), plan, dtype)
        have, want = leaves_of(params), leaves_of(built.params)
        there = leaves_of(placement.shardings(built.params, plan))

        def draw() -> dict[names.Path, Any]:
            drawn = leaves_of(built.laid(initial_state(self.config, self.seed)[0]))
            return {path: leaf for path, leaf in drawn.items() if is_factor(path)}

        fresh = jax.jit(draw, out_shardings={path: there[path] for path in want if is_factor(path)})()
        found = {path: fresh[path] if is_factor(path) else have[_of_base(path, want)] for path in want}
        return nnx.from_flat_state(list(found.items())), buffers


def _of_base(path: names.Path, adapted: dict[names.Path, Any]) -> names.Path:
    """The path of the same weight in the model without adapters."""
    return path[:-1] if path[-1] == WEIGHT and (*path[:-1], A) in adapted else path


def write_peft(source: Path, target: Path) -> list[str]:
    """Writes the adapters of a run into the new folder `target`, as PEFT reads them: adapter_config.json and
    adapter_model.safetensors, for the Hugging Face model that the run started from.

    A tensor made of several of our weights gets their factors side by side: one matrix A of all, and B with a block of
    rows per weight; rank and alpha grow in proportion. Returns the tensors whose adapters are left out: those of the
    multi-token-prediction block, which transformers does not have. Raises ConfigError, also for a run that PEFT
    cannot describe.
    """
    with open_folder(source) as folder:
        if not isinstance(folder, RunFolder) or folder.run.lora is None:
            raise ConfigError(f"{str(source)!r} has no adapters; expected a run folder with LoraConfig")
        lora, optimizer = folder.run.lora, folder.run.optimizer
        if optimizer is not None and optimizer.trained:
            raise ConfigError(f"the run's OptimizerConfig.trained is {optimizer.trained!r}; expected (), or {MERGE}")
        for kinds, why in UNKNOWN.items():
            if lora.kinds & {*kinds} & kinds_in(folder.config):
                expected = f"none of {', '.join(kinds)}, {why}; or {MERGE}"
                raise ConfigError(f"the run's LoraConfig.weights is {lora.weights!r}; expected {expected}")
        built = build(folder.run.model)
        plan = single_device_plan(PlanConfig(dispatch="allgather"), folder.config)
        params, _ = folder.read_trained(built, plan, "float32")
        factors = {path: np.asarray(leaf.get_value()) for path, leaf in leaves_of(params).items() if is_factor(path)}
        family = family_of(folder.config)
        table = names.table(family, folder.config)
    of_mtp = names.mtp_name(family, folder.config)
    tensors, ranks, left = {}, {}, []
    for name, tensor in table.items():
        if not any((*piece.path, A) in factors for piece in tensor.pieces):
            continue
        if of_mtp(name):
            left.append(name)
            continue
        module = name.removesuffix(".weight")
        old, new = RENAMED.get(family, ("", ""))
        module = new + module.removeprefix(old) if module.startswith(old) else module
        pair = _pair(name, tensor, factors)
        ranks[module] = len(pair[0])
        for part, array in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = np.ascontiguousarray(array)
    with new_folder(target) as scratch:
        write_atomically(scratch / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
        facts = json.dumps(_config(lora, ranks), indent=2) + "\n"
        write_atomically(scratch / "adapter_config.json", facts.encode())
    return left


def _pair(name: str, tensor: names.Tensor, factors: dict[names.Path, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The factors of a tensor (out, in) as PEFT has them: A (ranks, in) and B (out, ranks)."""
    whole = (slice(None),)
    linear = all(piece.transposed and piece.slices[-1:] == whole for piece in tensor.pieces)
    if len(tensor.shape) != 2 or not linear:
        raise ConfigError(f"{name} has an adapter; expected {MERGE}: PEFT adapts linear maps (out, in)")
    inward, outward = [], []
    for piece in tensor.pieces:
        a_dr, b_rf = (factors[(*piece.path, part)][piece.index] for part in FACTORS)
        rank = len(b_rf)
        rows_fr = np.zeros((tensor.shape[0], rank), np.float32)
        narrow = piece._replace(view=(*piece.view[:-1], rank), shape=(*piece.shape[:-1], rank))
        narrow.put(rows_fr, b_rf)
        inward.append(a_dr.T)
        outward.append(rows_fr)
    return np.concatenate(inward), np.concatenate(outward, axis=1)


def _config(lora: LoraConfig, ranks: dict[str, int]) -> dict[str, Any]:
    """The content of adapter_config.json. ranks: by module."""
    times = {module: rank // lora.rank for module, rank in ranks.items() if rank != lora.rank}
    alpha = lora.scale * lora.rank
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "r": lora.rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "use_rslora": False, "use_dora": False, "target_modules": sorted(ranks),
        "rank_pattern": {module: lora.rank * count for module, count in times.items()},
        "alpha_pattern": {module: alpha * count for module, count in times.items()},
    }  # fmt: skip
