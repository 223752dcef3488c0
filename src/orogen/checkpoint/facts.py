"""A checkpoint's JSON items: `layout`, the model's layout; `about`, the model and tokenizer that the checkpoint belongs
to; and `data`, the position of the source of batches.

Release 0.8.0 wrote the layout into the item `data`, and had no `about`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from orogen.checkpoint import checksums
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.model.layout import Layout, Whole
from orogen.model.stages import Stages

# Keys of the layout: how stages split the model, null if they do not, and its vocabulary.
STAGES, VOCABULARY = "stages", "vocab_size"
# Keys of `about`: the file of checksums, the tokenizer's files and the model's config.
LISTED, TOKENIZER, MODEL = "checksums", "tokenizer_files", "model_config"
ITEMS = {"layout": (STAGES, VOCABULARY), "about": (LISTED, TOKENIZER, MODEL)}


class AnotherModelError(ConfigError):
    """The checkpoint is undamaged, but not of the requested model."""


def layout_facts(layout: Layout, vocab_size: int | None) -> dict[str, Any]:
    """The item `layout` of a model with a vocabulary of `vocab_size`, padding rows not counted."""
    facts = {STAGES: dataclasses.asdict(layout) if isinstance(layout, Stages) else None}
    return facts if vocab_size is None else facts | {VOCABULARY: vocab_size}


def about_facts(run_dir: Path, model: ModelConfig | None) -> dict[str, Any]:
    """The item `about` of a checkpoint of the run."""
    facts = {LISTED: checksums.NAME, TOKENIZER: _tokenizer_files(run_dir / "tokenizer")}
    return facts if model is None else facts | {MODEL: dataclasses.asdict(model)}


def read_facts(folder: Path, item: str) -> dict[str, Any]:
    """The item `layout` or `about` of the checkpoint in `folder`; if it has neither, the item `data`, in which 0.8.0
    wrote these facts. Raises ConfigError."""
    present = [name for name in ITEMS if (folder / name).exists()]
    found = _read_json(folder, item if present else "data")
    if present and not found.keys() & set(ITEMS[item]):
        raise ConfigError(f"{folder / item / 'metadata'} has none of {', '.join(ITEMS[item])}; expected them there")
    size = found.get(VOCABULARY)
    if size is not None and (type(size) is not int or size < 1):
        file = folder / (item if present else "data") / "metadata"
        raise ConfigError(f"{file} has {VOCABULARY} {size!r}; expected a positive integer")
    return found


def read_layout(folder: Path, whole: Whole) -> Layout:
    """The layout of the layers `whole` in the checkpoint in `folder`: whole, or in stages. Raises ConfigError, also if
    the stages are of other layers."""
    saved = read_facts(folder, "layout").get(STAGES)
    if saved is None:
        return whole
    try:
        stages = Stages(tuple(saved["patterns"]), saved["mtp"], saved["stages"])
        legal = all(type(part) is str for part in (*stages.patterns, stages.mtp)) and type(stages.stages) is int
        legal = legal and stages.stages > 0 and len(stages.patterns) % stages.stages == 0
    except (KeyError, TypeError):
        legal = False
    if not legal or not stages.patterns:
        raise ConfigError(f"{folder} has the stages {saved!r}; expected patterns, mtp and stages")
    layers = "".join(stages.patterns)
    if (layers, stages.mtp) != (whole.main, whole.mtp):
        expected = f"expected {whole.main!r} and {whole.mtp!r}"
        raise AnotherModelError(f"{folder} has stages of the layers {layers!r} and {stages.mtp!r}; {expected}")
    return stages


def read_position(folder: Path) -> dict[str, Any]:
    """The position that the source of batches reported at the checkpoint in `folder`. Raises ConfigError."""
    data = _read_json(folder, "data")
    if any((folder / item).exists() for item in ITEMS):
        return data
    return {name: value for name, value in data.items() if name != STAGES}


def check_model(folder: Path, model: ModelConfig, config: Path) -> None:
    """Raises ConfigError unless the checkpoint in `folder` is of `model`, which was read from the file `config`."""
    saved = read_facts(folder, "about").get(MODEL, {})
    for field, value in json.loads(json.dumps(dataclasses.asdict(model))).items():
        if field in saved and saved[field] != value:
            raise AnotherModelError(
                f"{config} is of another model: ModelConfig.{field} is {value!r}; "
                f"expected {saved[field]!r}, as in checkpoint {folder.name}"
            )


def check_tokenizer(folder: Path, tokenizer: Path) -> None:
    """Raises ConfigError unless the files in `tokenizer` are those of the checkpoint in `folder`."""
    for name, wanted in read_facts(folder, "about").get(TOKENIZER, {}).items():
        file = tokenizer / name
        if checksums.digest(file) != wanted:
            raise ConfigError(f"{file} is damaged; expected the sha256 {wanted[:16]}… of checkpoint {folder.name}")


def _tokenizer_files(folder: Path) -> dict[str, str]:
    files = sorted(folder.iterdir()) if folder.is_dir() else ()
    return {file.name: checksums.digest(file) for file in files if file.is_file()}


def _read_json(folder: Path, item: str) -> dict[str, Any]:
    file = folder / item / "metadata"
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; expected it in a complete checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read ({type(error).__name__}); expected a JSON object") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} is {type(found).__name__}; expected a JSON object")
    return found
