"""The run folder: which run may use it, and the files that describe it (`config.gin`, `env.json`)."""

import dataclasses
import itertools
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from orogen.config.checks import ConfigError
from orogen.config.files import remove_unfinished, write_atomically
from orogen.config.load import load_saved
from orogen.config.run import RunConfig
from orogen.config.text import parts_of
from orogen.train.lock import NAME as LOCK

# What a resumed run may change: how long it trains, what it records, and what it does about bad steps. The plan may
# change too.
FREE_TRAIN_FIELDS = (
    "steps",
    "evaluate_every",
    "evaluate_rows",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_best",
    "spike_deviations",
    "spike_window",
    "roll_back_after",
    "repeat_bad_steps",
    "max_roll_backs",
    "hang_minutes",
    "sample_prompts",
    "sample_tokens",
    "ngram_order",
    "loggers",
)
# Of how it computes, when the recipe changes may be decided late.
FREE_PRECISION_FIELDS = ("switch_step", "switch_to", "switch_roles", "health_every")
# Where the teacher runs, and where its log-probabilities lie; the data's position knows whose they are and of how many
# tokens.
FREE_DISTILL_FIELDS = ("teacher_plan", "logits")
FREE_FIELDS = {"train": FREE_TRAIN_FIELDS, "precision": FREE_PRECISION_FIELDS, "distill": FREE_DISTILL_FIELDS}
# What a resumed run's config is compared by; the plan may change.
PARTS = (
    "model", "data", "train", "optimizer", "precision", "chat", "distill", "preference", "elastic", "lora",
)  # fmt: skip
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def check_folder(run_dir: Path, config: RunConfig, *, resume: bool) -> None:
    """Raises ConfigError unless `run_dir` may become, or stay, the folder of this run. Changes nothing.

    A folder with a run in it is taken only with `resume`, and only if its config differs in nothing but the plan,
    the number of steps and what is recorded.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run folder {str(run_dir)!r} is a file; expected a folder or a new name")
    saved = run_dir / "config.gin"
    if saved.exists():
        differing = _differences(_saved_config(saved), config)
        if differing:
            raise ConfigError(f"run folder {str(run_dir)!r} has another config: {differing[0]}; expected an equal one")
        if not resume:
            raise ConfigError(f"run folder {str(run_dir)!r} holds a run; expected --resume or another folder")
    elif run_dir.exists() and any(not _left_by_a_start(path) for path in run_dir.iterdir()):
        raise ConfigError(f"run folder {str(run_dir)!r} is not empty and has no config.gin; expected a new folder")


def _left_by_a_start(path: Path) -> bool:
    """Whether a run that ended before it wrote `config.gin` may have left this."""
    if path.suffix == ".tmp" or path.name.startswith(LOCK):
        return True
    return path.name == "checkpoints" and path.is_dir() and not any(path.iterdir())


def describe_run(run_dir: Path, text: str, facts: dict[str, Any]) -> None:
    """Writes `config.gin` and `env.json`, and removes what a process that was killed has not finished. The caller holds
    the folder's lock."""
    run_dir.mkdir(parents=True, exist_ok=True)
    remove_unfinished(run_dir)
    write_atomically(run_dir / "config.gin", text.encode())
    write_atomically(run_dir / "env.json", (json.dumps(facts, indent=2) + "\n").encode())


def keep_orphaned_metrics(run_dir: Path) -> Path | None:
    """Renames the metrics of a run that has no checkpoint to resume from; returns the new path, or None."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        return None
    numbers = (run_dir / f"metrics.{number}.jsonl" for number in itertools.count(1))
    return metrics.rename(next(name for name in numbers if not name.exists()))


def _saved_config(file: Path) -> RunConfig:
    try:
        return load_saved(file)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _differences(saved: RunConfig, wanted: RunConfig) -> list[str]:
    found = []
    there, here = parts_of(saved), parts_of(wanted)
    for part in PARTS:
        before, now = there[part], here[part]
        if (before is None) != (now is None):
            found.append(f"{part} is {'missing' if before is None else 'present'}")
            continue
        for field in dataclasses.fields(now) if now is not None else ():
            old, new = getattr(before, field.name), getattr(now, field.name)
            free = FREE_FIELDS.get(part, ())
            if old != new and field.name not in free:
                found.append(f"{type(now).__name__}.{field.name} is {old!r} there and {new!r} here")
    return found


def environment(**facts: Any) -> dict[str, Any]:
    """Commit, versions and devices, with `facts` added: what `env.json` holds."""
    device = jax.devices()[0]
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "devices": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        **facts,
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:  # no git on this machine
        return None
    return answer.stdout.strip() or None
