"""Opens any checkpoint as a model in memory, on any plan and in any dtype."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from flax import nnx

from orogen.checkpoint.folders import (
    AS_STORED,
    CONFIG,
    Folder,
    HuggingFaceFolder,
    OrogenFolder,
    RunFolder,
    read_kept,
)
from orogen.checkpoint.held import Held
from orogen.config.checks import ConfigError, require
from orogen.config.dtype import WEIGHTS
from orogen.config.engine import DECODED
from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.config.recipe import Scales
from orogen.config.run import RunConfig
from orogen.cost.assemble import assemble
from orogen.data.tokenizer import Tokenizer, check_rows
from orogen.model.lm import Built, build
from orogen.parallel.plan import Plan, single_device_plan


class Opened(NamedTuple):
    """A model on a plan, with its tokenizer if it has one. cache_scales: of keys and values in FP8, by layer of the
    pattern; None where the checkpoint has none, a text what is wrong with one's own."""

    config: ModelConfig
    plan: Plan
    built: Built
    params: nnx.State
    buffers: nnx.State
    tokenizer: Tokenizer | None
    cache_scales: tuple[Scales | str | None, ...] | None = None

    def require_one_device(self) -> None:
        """Raises ConfigError unless the plan has one device, drops no tokens and computes plain matrix products."""
        plan = self.plan.config
        require(plan.devices == 1, plan, "data, context, tensor, stage", "1: this runs on one device")
        require(plan.capacity_factor is None, plan, "capacity_factor", "None: no token is dropped here")
        require(plan.linear == "plain", plan, "linear", "plain here")


def open_folder(folder: Path) -> RunFolder | OrogenFolder | HuggingFaceFolder:
    """The run folder, one checkpoint of it (RUN/checkpoints/STEP), Orogen checkpoint folder or Hugging Face folder.
    Raises ConfigError for any other."""
    if folder.parent.name == "checkpoints" and folder.name.isdecimal() and (folder.parents[1] / CONFIG).is_file():
        return RunFolder(folder.parents[1], int(folder.name))
    if (folder / CONFIG).is_file():
        if (folder / "checkpoints").is_dir():
            return RunFolder(folder)
        stored = read_kept(folder).get("tensors") == AS_STORED
        return HuggingFaceFolder(folder, stored=True) if stored else OrogenFolder(folder)
    if (folder / "config.json").is_file():
        return HuggingFaceFolder(folder)
    raise ConfigError(
        f"checkpoint {str(folder)!r} has no config.gin and no config.json; expected a run folder, an Orogen checkpoint "
        "folder or a Hugging Face folder"
    )


def open_model(
    folder: Path, plan: PlanConfig | None = None, dtype: str = "float32", *, tokenizer: bool = True
) -> Opened:
    """The model that any checkpoint folder holds. See `read_model`."""
    with open_folder(folder) as opened:
        return read_model(opened, plan, dtype, tokenizer=tokenizer)


def read_model(
    folder: Folder,
    plan: PlanConfig | None = None,
    dtype: str = "float32",
    *,
    tokenizer: bool = True,
    weights: str = DECODED,
) -> Opened:
    """The model of an open folder on `plan`. Raises ConfigError.

    plan: None: one device, with kernels that run on any backend and no dropped tokens. dtype: of the parameters, except
    those that are used in float32. tokenizer: whether to read the folder's tokenizer. weights: `fp8` holds the weights
    that a quantised folder stores in FP8 as they are, half the bytes of bfloat16, for an engine; `decoded` does not.
    """
    if dtype not in WEIGHTS:
        raise ConfigError(f"dtype is {dtype!r}; expected {', '.join(WEIGHTS)}")
    loaded = folder.tokenizer() if tokenizer else None
    if loaded is not None:
        check_rows(loaded, folder.config.vocab_size)
    if plan is not None:
        RunConfig(model=folder.config, plan=plan).check()
        plan.require_half_precision(dtype)
    if plan is None:
        chosen, built = single_device_plan(_on_one_device(folder.plan), folder.config), build(folder.config)
    else:
        chosen, built = assemble(folder.config, plan)
    if weights == DECODED:
        params, buffers = folder.read(built, chosen, dtype)
    elif isinstance(folder, HuggingFaceFolder) and built.layout == build(folder.config).layout:
        params, buffers = folder.read_held(built, chosen, dtype)
    else:
        expected = "'decoded': the checkpoint is not quantised, or the plan has stages"
        raise ConfigError(f"EngineConfig.weights is {weights!r}; expected {expected}")
    scales = folder.tensors.cache_scales if isinstance(folder, HuggingFaceFolder) else None
    return Opened(folder.config, chosen, built, params, buffers, loaded, scales)


def _on_one_device(plan: PlanConfig | None) -> PlanConfig:
    """What one device keeps of a run's plan: kernels and products that run on any backend, no offloading."""
    if plan is None:
        return PlanConfig(dispatch="allgather")
    kernels = {field: getattr(PlanConfig, field) for field in FOR_GPU if getattr(plan, field) == FOR_GPU[field]}
    return dataclasses.replace(plan.dropping_none(), **kernels, linear="plain", offload=(), offload_optimizer=False)


def held_share(folder: Folder, dtype: str) -> float:
    """The bytes that `read_model` holds with `weights='fp8'`, over those of all parameters in `dtype`. Raises
    ConfigError for a folder without weights in FP8."""
    if not isinstance(folder, HuggingFaceFolder):
        raise ConfigError("EngineConfig.weights is 'fp8'; expected 'decoded': the checkpoint is not quantised")
    return Held(folder.tensors).share(dtype)
