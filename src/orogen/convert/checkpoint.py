"""Any checkpoint as a model in memory: a run folder, an Orogen checkpoint folder or a Hugging Face folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from orogen.config.checks import ConfigError
from orogen.config.load import load_saved
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.convert.huggingface import (
    CONFIG,
    Fits,
    HuggingFaceFolder,
    OrogenFolder,
    check_shapes,
    context_length,
    copy_kept,
    dotted,
    model_config,
    to_hf,
)
from orogen.convert.names import Path as Names
from orogen.convert.tensor_files import Spec, check_fits
from orogen.data.tokenizer import Tokenizer, check_rows
from orogen.infer.generate import Loaded
from orogen.infer.generate import load_checkpoint as load_run
from orogen.infer.generate import load_weights as load_run_weights
from orogen.model.lm import Built, build
from orogen.parallel import placement
from orogen.parallel.plan import single_device_plan
from orogen.train.checkpoint import Checkpoints
from orogen.train.loop import Origin


def kind(folder: Path) -> str:
    """`run`, `orogen` or `huggingface`. Raises ConfigError for any other folder."""
    if (folder / CONFIG).is_file():
        return "run" if (folder / "checkpoints").is_dir() else "orogen"
    if (folder / "config.json").is_file():
        return "huggingface"
    raise ConfigError(
        f"checkpoint {str(folder)!r} has no config.gin and no config.json; expected a run folder, an Orogen checkpoint "
        "folder or a Hugging Face folder"
    )


def read_model_config(folder: Path) -> ModelConfig:
    """The model that any checkpoint folder holds. Raises ConfigError."""
    if kind(folder) != "huggingface":
        return model_config(folder)
    with HuggingFaceFolder(folder) as opened:
        return opened.config


def goes_by_blocks(folder: Path) -> bool:
    """Whether the attention of a model that is loaded from the folder goes by blocks: a run's plan decides."""
    return kind(folder) == "run" and load_saved(folder / CONFIG).plan.attention == "blocked"


def load_parameters(
    folder: Path, built: Built, place: Callable[[Any], Any], *, dtype: str = "float32"
) -> tuple[nnx.State, nnx.State]:
    """Parameters and buffers of any checkpoint folder, leaf by leaf, each placed with its sharding.

    place: gives the shardings of a tree like `built.params` or `built.buffers`. dtype: of the parameters, except those
    that stay float32 in
    computation. Raises ConfigError with every parameter that is missing, surplus or of another shape.
    """
    if kind(folder) == "run":
        with Checkpoints(folder) as checkpoints:
            checkpoints.check_config(read_model_config(folder))
            return checkpoints.restore_model(built.params, built.buffers, place)
    opened = HuggingFaceFolder(folder) if kind(folder) == "huggingface" else OrogenFolder(folder)
    with opened as source:
        have = source.parameters()
        leaves = [_flat(tree) for tree in (built.params, built.buffers)]
        want = {dotted(path): leaf.get_value().shape for tree in leaves for path, leaf in tree.items()}
        check_shapes(folder, {dotted(path): spec.shape for path, spec in have.items()}, want)
        wide = {path for path, leaf in leaves[0].items() if leaf.get_metadata().get("float32")} | leaves[1].keys()

        def put(path: Names, leaf: Any, sharding: Any) -> nnx.Variable:
            array = source.parameter(path, have[path])
            kept = jnp.dtype(jnp.float32 if path in wide else dtype)
            check_fits(f"{folder}: {dotted(path)}", array, kept)
            return leaf.replace(
                jax.make_array_from_callback(
                    array.shape, sharding, lambda part: np.ascontiguousarray(array[part], kept)
                )
            )

        placed = [_flat(place(tree)) for tree in (built.params, built.buffers)]
        states = [
            nnx.from_flat_state([(path, put(path, leaf, _value(there[path]))) for path, leaf in tree.items()])
            for tree, there in zip(leaves, placed, strict=True)
        ]
    return states[0], states[1]


def load_checkpoint(folder: Path) -> Loaded:
    """The model of any checkpoint folder, on one device, with its tokenizer if it has one. Raises ConfigError."""
    if kind(folder) == "run":
        return load_run(folder)
    tokenizer = read_tokenizer(folder)
    loaded = load_weights(folder)
    if tokenizer is not None:
        check_rows(tokenizer, loaded.config.vocab_size)
    return loaded._replace(tokenizer=tokenizer)


def load_weights(folder: Path) -> Loaded:
    """The model of any checkpoint folder, on one device; its tokenizer is not read. Raises ConfigError."""
    if kind(folder) == "run":
        return load_run_weights(folder)
    config = read_model_config(folder)
    plan = single_device_plan(PlanConfig(dispatch="allgather"), config)
    built = build(config)
    params, buffers = load_parameters(folder, built, lambda tree: placement.shardings(tree, plan))
    return Loaded(config, built, params, buffers, None, plan)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of any checkpoint folder; None if it has none."""
    place = folder if kind(folder) == "huggingface" else folder / "tokenizer"
    return Tokenizer.load(place) if (place / "tokenizer.json").is_file() else None


def origin(folder: Path) -> Origin:
    """Any checkpoint folder as what a training run starts from."""

    def keep(run_dir: Path) -> None:
        copy_kept(folder, run_dir)

    tokenizer = read_tokenizer(folder)
    known = None if tokenizer is None else tokenizer.as_in_training()
    return Origin(lambda built, place: load_parameters(folder, built, place), known, keep)


def export(source: Path, target: Path, *, dtype: str | None = None, fits: Fits = lambda tensor, held: None) -> None:
    """`to_hf` of a run folder or an Orogen checkpoint folder.

    dtype: None keeps what an Orogen checkpoint folder has, and writes a run's float32 masters as bfloat16.
    """
    found = kind(source)
    if found == "huggingface":
        raise ConfigError(f"{str(source)!r} is a Hugging Face folder; expected a run or an Orogen checkpoint folder")
    if found == "orogen":
        with OrogenFolder(source) as opened:
            read = lambda path, index: opened.reader.read(dotted(path), index)  # noqa: E731
            return to_hf(opened.config, opened.parameters(), read, source, target, dtype=dtype, fits=fits)
    loaded = load_run_weights(source)
    leaves = {path: leaf.get_value() for tree in (loaded.params, loaded.buffers) for path, leaf in _flat(tree).items()}
    specs = {path: Spec(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    read = lambda path, index: np.asarray(leaves[path][index])  # noqa: E731
    context = context_length(source)
    return to_hf(loaded.config, specs, read, source, target, dtype=dtype or "bfloat16", context=context, fits=fits)


def _flat(tree: Any) -> dict[Names, Any]:
    leaves: Any = nnx.to_flat_state(tree)
    return dict(leaves)


def _value(variable: Any) -> Any:
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable
