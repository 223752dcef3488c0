"""Checkpoints by orbax: asynchronous, atomic, a few kept. The model is an item of its own, so that a reader can take
it without the optimizer. What stages of a pipeline save is laid out as they keep it; the data's position says how.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from orogen.config.checks import ConfigError, is_unicode
from orogen.model.stages import Stages
from orogen.train.state import TrainState

STAGES = "stages"
MODEL_FIELDS = ("params", "buffers")


class Checkpoints:
    """The checkpoints of a run folder. Use as a context manager: leaving it waits for what is being written."""

    def __init__(self, run_dir: str | Path, *, keep: int | None = None):
        self.folder = Path(run_dir).resolve() / "checkpoints"
        if not is_unicode(str(self.folder)):  # tensorstore takes no others
            raise ConfigError(f"run folder {str(run_dir)!r}; expected a path in UTF-8")
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

    @property
    def stages(self) -> Stages | None:
        """How the model of the latest checkpoint is cut; None if it is whole. Raises ConfigError without one."""
        saved = self._read({"data": ocp.args.JsonRestore()})["data"].get(STAGES)
        return None if saved is None else Stages(tuple(saved["patterns"]), saved["mtp"], saved["stages"])

    def save(self, state: TrainState, data_position: dict[str, Any], stages: Stages | None = None) -> None:
        """Starts writing the state after step `state.step` and its data's position; no-op if that step is there."""
        if stages is not None:
            data_position = data_position | {STAGES: dataclasses.asdict(stages)}
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
        items = {"trainer": ocp.args.StandardRestore(trainer), "data": ocp.args.JsonRestore()}
        restored = self._read(items, model)
        position = {name: value for name, value in restored["data"].items() if name != STAGES}
        return _join(target, {**restored["model"], **restored["trainer"]}), position

    def restore_model(self, params: Any, buffers: Any, place: Callable[[Any], Any]) -> tuple[Any, Any]:
        """The latest parameters and buffers of the whole model, as the abstract `params` and `buffers`. place: gives
        the shardings of such trees, or of the same trees cut into stages."""
        stages, whole = self.stages, {"params": params, "buffers": buffers}
        saved = whole if stages is None else {name: jax.eval_shape(stages.split, t) for name, t in whole.items()}
        target = {name: with_shardings(tree, place(tree)) for name, tree in saved.items()}
        model = _join(target, self._read({}, _named(target))["model"])
        if stages is not None:
            placed = {name: place(tree) for name, tree in whole.items()}
            join = lambda model: {name: stages.join(tree) for name, tree in model.items()}  # noqa: E731
            model = jax.jit(join, out_shardings=placed)(model)
        return model["params"], model["buffers"]

    def _read(self, items: dict[str, Any], model: dict[str, Any] | None = None) -> Any:
        """Items of the latest checkpoint, and its model onto the abstract arrays `model`. Raises ConfigError if any is
        damaged."""
        if self.latest is None:
            raise ConfigError(f"{self.folder} holds no complete checkpoint; expected at least one")
        try:
            if model is not None:
                self._check(self.latest, model)
                items = items | {"model": ocp.args.StandardRestore(model)}
            return self._manager.restore(self.latest, args=ocp.args.Composite(**items))
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
