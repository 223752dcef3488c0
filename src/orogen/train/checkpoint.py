"""Checkpoints by orbax: asynchronous, atomic, a few kept. The model is an item of its own, so that a reader can take
it without the optimizer.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from orogen.config.checks import ConfigError
from orogen.train.state import TrainState

MODEL_FIELDS = ("params", "buffers")


class Checkpoints:
    """The checkpoints of a run folder. Use as a context manager: leaving it waits for what is being written."""

    def __init__(self, run_dir: str | Path, *, keep: int | None = None):
        self.folder = Path(run_dir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {
            "model": ocp.StandardCheckpointHandler(),
            "trainer": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The last complete step, None without one."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_position: dict[str, Any]) -> None:
        """Starts writing the state after step `state.step` and its data's position; no-op if that step is there."""
        step = int(state.step)
        if step == self.latest:
            return
        model, trainer = _split(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model),
                trainer=ocp.args.StandardSave(trainer),
                data=ocp.args.JsonSave(data_position),
            ),
        )

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The latest state and data position. target: abstract arrays with the shardings to restore onto."""
        model, trainer = _split(target)
        restored = self._read(model, trainer=ocp.args.StandardRestore(trainer), data=ocp.args.JsonRestore())
        return _join(target, {**restored["model"], **restored["trainer"]}), restored["data"]

    def restore_model(self, params: Any, buffers: Any) -> tuple[Any, Any]:
        """The latest parameters and buffers, onto abstract arrays with shardings."""
        target = {"params": params, "buffers": buffers}
        named = _named(target)
        model = _join(target, self._read(named)["model"])
        return model["params"], model["buffers"]

    def _read(self, model: dict[str, Any], **others: Any) -> Any:
        """The latest model, onto the abstract arrays `model`, and other items. Raises ConfigError if any is damaged."""
        if self.latest is None:
            raise ConfigError(f"{self.folder} holds no complete checkpoint; expected at least one")
        try:
            self._check(self.latest, model)
            arguments = ocp.args.Composite(model=ocp.args.StandardRestore(model), **others)
            return self._manager.restore(self.latest, args=arguments)
        except ConfigError:
            raise
        except (ValueError, KeyError, OSError) as error:  # what orbax and tensorstore make of a damaged file
            reason = (str(error).splitlines() or [""])[0][:200]
            raise ConfigError(
                f"{self.folder / str(self.latest)} cannot be read ({type(error).__name__}: {reason}); "
                "expected a whole checkpoint: without this folder, the one before it counts"
            ) from error

    def _check(self, step: int, wanted: dict[str, Any]) -> None:
        """Raises ConfigError naming the first array that the checkpoint lacks, has too many, or in another shape."""
        saved = self._manager.item_metadata(step)["model"]
        saved = getattr(saved, "tree", saved)
        for name in sorted(set(saved) | set(wanted)):
            have = tuple(saved[name].shape) if name in saved else "nothing"
            want = tuple(wanted[name].shape) if name in wanted else "nothing"
            if have != want:
                raise ConfigError(f"{self.folder} is of another model: {name} is {have}; expected {want}")


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Abstract arrays that carry their sharding."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = state._asdict()
    return (
        _named({name: fields[name] for name in MODEL_FIELDS}),
        _named({name: value for name, value in fields.items() if name not in MODEL_FIELDS}),
    )


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by the path to them, so that what is on disk does not depend on Python classes."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _join(target: Any, leaves: dict[str, Any]) -> Any:
    fields = target._asdict() if isinstance(target, TrainState) else target
    joined = jax.tree_util.tree_map_with_path(lambda path, _: leaves[_name(path)], fields)
    return TrainState(**joined) if isinstance(target, TrainState) else joined


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
