"""Checkpoints: written by orbax beside the run, complete only with their list of checksums, a few kept.

A checkpoint is the folder `checkpoints/STEP` with the items model, trainer, layout, about and data. The model is an
item of its own, so that a reader can take it without the optimizer. Arrays are saved as they lie on the devices, and a
vocabulary with the rows to which the plan padded it; the layout says how. Rows are added or dropped when arrays are
read. about: the model's config and the tokenizer's files. data: where the source of batches was, and nothing else.
A folder under its own name is complete: orbax writes into `STEP.partial`, which is renamed once the checksums are in
it. Folders of release 0.8.0 have the layout within data, and no checksums; they count if orbax's marker is there.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from orogen.config.checks import ConfigError, is_unicode
from orogen.config.model import ModelConfig
from orogen.model.layout import Layout
from orogen.model.stages import Stages
from orogen.model.vocabulary import vocab_dim
from orogen.train import checksums
from orogen.train.state import TrainState
from orogen.train.streams import say

# Keys of the layout: how stages split the model, null if they do not, and its vocabulary.
STAGES, VOCABULARY = "stages", "vocab_size"
# Of what a checkpoint says about itself: that there are checksums, the tokenizer's files and the model's config.
LISTED, TOKENIZER, MODEL = "checksums", "tokenizer_files", "model_config"
ITEMS = {"layout": (STAGES, VOCABULARY), "about": (LISTED, TOKENIZER, MODEL)}
MODEL_FIELDS = ("params", "buffers")
MARKER = "commit_success.txt"
PARTIAL, REMOVED = ".partial", ".removed"
# What a killed process may leave; any other folder is the user's, such as a damaged checkpoint that was moved away.
LEFT = re.compile(rf"\d+({re.escape(PARTIAL)}|{re.escape(REMOVED)}|\.orbax-checkpoint-tmp.*)+")


class Checkpoints:
    """The checkpoints of a run folder. Use as a context manager: leaving it waits for pending writes.

    keep: how many stay, all if None. model: written into each, for `check_config`. vocab_size: of the model that is
    saved and restored, whatever rows plans pad it to; None: that of `model`, or else of its arrays.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        keep: int | None = None,
        model: ModelConfig | None = None,
        vocab_size: int | None = None,
    ):
        self.run_dir = Path(run_dir).resolve()
        self.vocab_size = model.vocab_size if vocab_size is None and model is not None else vocab_size
        self.folder = self.run_dir / "checkpoints"
        if not is_unicode(str(self.folder)):  # tensorstore accepts no others
            raise ConfigError(f"run folder {str(run_dir)!r}; expected a path in UTF-8")
        self._keep, self._model = keep, model
        self._writer: ocp.AsyncCheckpointer | None = None
        self._finisher = ThreadPoolExecutor(1)
        self._finishing: Future[None] | None = None
        self._written: int | None = None
        self._checked: set[int] = set()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            if self._writer is not None:
                self._writer.close()

    @property
    def latest(self) -> int | None:
        """The last step whose folder is complete, None without one."""
        return max(self._steps(), default=None)

    @property
    def stages(self) -> Stages | None:
        """How stages split the model of the latest checkpoint; None if it is whole. Raises ConfigError without one."""
        return self._read(self._stages)

    def save(self, state: TrainState, data_position: dict[str, Any], layout: Layout) -> None:
        """Starts writing the state after step `state.step`, which lies as `layout` says, and its data's position; no-op
        if that step is there."""
        step = int(state.step)
        self.wait()
        if step in (self.latest, self._written):
            return
        about = {LISTED: checksums.NAME, TOKENIZER: self._tokenizer()}
        if self._model is not None:
            about |= {MODEL: dataclasses.asdict(self._model)}
        lies = {STAGES: dataclasses.asdict(layout) if isinstance(layout, Stages) else None}
        if self.vocab_size is not None:
            lies |= {VOCABULARY: self.vocab_size}
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.iterdir():  # by a process that was killed
                if LEFT.fullmatch(left.name) and left.is_dir():
                    shutil.rmtree(left)
            self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        model, trainer = _split(state)
        partial = self.folder / f"{step}{PARTIAL}"
        args = ocp.args.Composite(
            model=ocp.args.StandardSave(_named(model)),
            trainer=ocp.args.StandardSave(_named(trainer)),
            layout=ocp.args.JsonSave(lies),
            about=ocp.args.JsonSave(about),
            data=ocp.args.JsonSave(data_position),
        )
        self._writer.save(partial, args=args)
        self._written = step
        self._finishing = self._finisher.submit(self._finish, partial, step)

    def wait(self) -> None:
        """Waits for pending writes. Raises what went wrong in them."""
        if self._finishing is not None:
            finishing, self._finishing = self._finishing, None
            finishing.result()

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The latest state and data position. target: abstract arrays with the shardings to restore onto."""
        model, trainer = _split(target)

        def read(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
            leaves = {**self._item(step, "model", model), **self._item(step, "trainer", trainer)}
            added = [name for names in ITEMS.values() for name in names]  # 0.8.0's
            return leaves, {name: value for name, value in self._data(step).items() if name not in added}

        leaves, position = self._read(read)
        return _join(target, leaves), position

    def restore_model(self, params: Any, buffers: Any, place: Callable[[Any], Any]) -> tuple[Any, Any]:
        """The latest parameters and buffers of the whole model, as the abstract `params` and `buffers`. place: gives
        the shardings of such trees, or of the same trees split into stages."""
        whole = {"params": params, "buffers": buffers}

        def read(step: int) -> tuple[Stages | None, Any]:
            stages = self._stages(step)
            saved = whole if stages is None else {name: jax.eval_shape(stages.split, t) for name, t in whole.items()}
            target = {name: with_shardings(tree, place(tree)) for name, tree in saved.items()}
            return stages, _join(target, self._item(step, "model", target))

        stages, model = self._read(read)
        if stages is not None:
            placed = {name: place(tree) for name, tree in whole.items()}
            join = lambda model: {name: stages.join(tree) for name, tree in model.items()}  # noqa: E731
            model = jax.jit(join, out_shardings=placed)(model)
        return model["params"], model["buffers"]

    def check_config(self, model: ModelConfig) -> None:
        """Raises ConfigError unless the run folder's config, read as `model`, is that of the latest checkpoint."""
        if (step := self.latest) is None:
            return
        saved = self._facts(step, "about").get(MODEL, {})
        for field, value in json.loads(json.dumps(dataclasses.asdict(model))).items():
            if field in saved and saved[field] != value:
                raise ConfigError(
                    f"{self.run_dir / 'config.gin'} is of another model: ModelConfig.{field} is {value!r}; "
                    f"expected {saved[field]!r}, as in checkpoint {step}"
                )

    def check_tokenizer(self) -> None:
        """Raises ConfigError unless the run folder's tokenizer is that of the latest checkpoint."""
        if (step := self.latest) is None:
            return
        for name, wanted in self._facts(step, "about").get(TOKENIZER, {}).items():
            file = self.run_dir / "tokenizer" / name
            if checksums.digest(file) != wanted:
                raise ConfigError(f"{file} is damaged; expected the sha256 {wanted[:16]}… of checkpoint {step}")

    def _finish(self, partial: Path, step: int) -> None:
        """Turns the folder that orbax is writing into a checkpoint, then removes the oldest."""
        assert self._writer is not None
        self._writer.wait_until_finished()
        checksums.write(partial)
        partial.rename(self.folder / str(step))
        # The newest, which is complete, is never removed.
        for old in self._steps()[: -self._keep] if self._keep else ():
            removed = (self.folder / str(old)).rename(self.folder / f"{old}{REMOVED}")
            shutil.rmtree(removed)

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def _tokenizer(self) -> dict[str, str]:
        folder = self.run_dir / "tokenizer"
        files = sorted(folder.iterdir()) if folder.is_dir() else ()
        return {file.name: checksums.digest(file) for file in files if file.is_file()}

    def _read(self, read: Callable[[int], Any]) -> Any:
        """`read` of the latest checkpoint once it was found undamaged. Raises ConfigError that names the damaged file
        and the latest undamaged checkpoint before it."""
        while True:
            step = self.latest
            if step is None:
                raise ConfigError(f"{self.folder} holds no complete checkpoint; expected at least one")
            try:
                self._check_whole(step)
                return read(step)
            except (_AnotherModelError, MemoryError):
                raise
            except Exception as error:  # orbax, tensorstore and jax raise errors of any type on a damaged file
                if self.latest != step:  # a run that continues has removed it meanwhile
                    continue
                if "RESOURCE_EXHAUSTED" in str(error):  # jax's own MemoryError: the files are not to blame
                    raise
                folder, reason = self.folder / str(step), " ".join(str(error).split())[:300]
                if not isinstance(error, ConfigError):
                    reason = f"{folder} cannot be read ({type(error).__name__}: {reason}); expected a whole checkpoint"
                raise ConfigError(f"{reason}; {self._before(step)}") from error

    def _before(self, step: int) -> str:
        for earlier in reversed(self._steps()):
            if earlier < step:
                try:
                    self._check_whole(earlier)
                except ConfigError:
                    continue
                return f"{self.folder / str(earlier)} is whole and counts once {self.folder / str(step)} is moved away"
        return "no checkpoint before it is whole"

    def _check_whole(self, step: int) -> None:
        """Raises ConfigError naming the first file of checkpoint `step` that is not as it was written."""
        if step in self._checked:
            return
        folder = self.folder / str(step)
        if (folder / checksums.NAME).exists():
            checksums.check(folder, optional=MARKER)
        elif LISTED in self._facts(step, "about"):
            raise ConfigError(f"{folder / checksums.NAME} is missing; expected it in a whole checkpoint")
        elif not (folder / MARKER).is_file():
            raise ConfigError(f"{folder} has neither {checksums.NAME} nor {MARKER}; expected one in a whole checkpoint")
        else:
            say(f"{folder} has no checksums, as an earlier release wrote it: its bytes are not checked")
        self._checked.add(step)

    def _facts(self, step: int, item: str) -> dict[str, Any]:
        """The item `layout` or `about`; of a checkpoint without either, what 0.8.0 wrote beside the data's position."""
        folder = self.folder / str(step)
        present = [name for name in ITEMS if (folder / name).exists()]
        found = self._json(step, item if present else "data")
        if present and not found.keys() & set(ITEMS[item]):
            raise ConfigError(f"{folder / item / 'metadata'} has none of {', '.join(ITEMS[item])}; expected them there")
        words = found.get(VOCABULARY)
        if words is not None and (type(words) is not int or words < 1):
            raise ConfigError(f"{folder} has {VOCABULARY} {words!r}; expected a positive integer")
        return found

    def _stages(self, step: int) -> Stages | None:
        """How stages split the model of a checkpoint. Raises ConfigError."""
        return _stages(self._facts(step, "layout"), self.folder / str(step))

    def _data(self, step: int) -> dict[str, Any]:
        """The item that says where the source of batches was."""
        data = self._json(step, "data")
        for field in ("position", "identity"):
            if not isinstance(data.get(field), dict):
                file = self.folder / str(step) / "data" / "metadata"
                raise ConfigError(f"{file} has no object {field!r}; expected one: where the data was")
        return data

    def _json(self, step: int, item: str) -> dict[str, Any]:
        file = self.folder / str(step) / item / "metadata"
        try:
            found = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"{file} is missing; expected it in a whole checkpoint") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{file} cannot be read ({type(error).__name__}); expected a JSON object") from None
        if not isinstance(found, dict):
            raise ConfigError(f"{file} is {type(found).__name__}; expected a JSON object")
        return found

    def _item(self, step: int, item: str, target: Any) -> dict[str, Any]:
        """The arrays of an item by their leaves' names, onto the tree `target` of abstract arrays."""
        self._check(step, item, target)
        # Not strict: rows of the vocabulary are zeros where there are more of them here, or are left out.
        arguments = ocp.args.StandardRestore(_named(target), strict=False)
        folder: Any = self.folder / str(step) / item  # typed as a path of etils
        return ocp.StandardCheckpointHandler().restore(folder, args=arguments)

    def _check(self, step: int, item: str, target: Any) -> None:
        """Raises ConfigError naming the first array that is missing, surplus or of another shape, apart from the rows
        to which plans pad a vocabulary."""
        folder: Any = self.folder / str(step) / item
        saved: Any = ocp.StandardCheckpointHandler().metadata(folder)
        saved, wanted, dims = getattr(saved, "tree", saved), _named(target), _vocab_dims(target)
        recorded = self._facts(step, "layout").get(VOCABULARY)
        for name in sorted(set(saved) | set(wanted)):
            have = _filled_from(saved[name].shape, dims.get(name), recorded) if name in saved else "nothing"
            want = _filled_from(wanted[name].shape, dims.get(name), self.vocab_size) if name in wanted else "nothing"
            if have != want:
                raise _AnotherModelError(f"{self.folder} is of another model: {name} is {have}; expected {want}")


def _vocab_dims(tree: Any) -> dict[str, int | None]:
    """By the name of a leaf, its dimension over the vocabulary, counted from the last."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {_name(path): vocab_dim(leaf) if isinstance(leaf, nnx.Variable) else None for path, leaf in found}


def _filled_from(shape: Sequence[int], dim: int | None, vocab_size: int | None) -> tuple[int, ...]:
    """The shape without the rows beyond a vocabulary of `vocab_size`, if that is known and there are any."""
    kept = list(shape)
    if dim is not None and vocab_size is not None:
        kept[dim] = min(kept[dim], vocab_size)
    return tuple(kept)


class _AnotherModelError(ConfigError):
    """The checkpoint is undamaged, but not of the requested model."""


def _stages(facts: dict[str, Any], folder: Path) -> Stages | None:
    """How stages split the model, from what a checkpoint says. Raises ConfigError."""
    saved = facts.get(STAGES)
    if saved is None:
        return None
    try:
        stages = Stages(tuple(saved["patterns"]), saved["mtp"], saved["stages"])
        legal = all(type(part) is str for part in (*stages.patterns, stages.mtp)) and type(stages.stages) is int
        legal = legal and stages.stages > 0 and len(stages.patterns) % stages.stages == 0
    except (KeyError, TypeError):
        legal = False
    if not legal or not stages.patterns:
        raise ConfigError(f"{folder} has the stages {saved!r}; expected patterns, mtp and stages")
    return stages


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Abstract arrays that carry their sharding."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = state._asdict()
    return (
        {name: fields[name] for name in MODEL_FIELDS},
        {name: value for name, value in fields.items() if name not in MODEL_FIELDS},
    )


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, so that the files do not depend on Python classes."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _join(target: Any, leaves: dict[str, Any]) -> Any:
    fields = target._asdict() if isinstance(target, TrainState) else target
    joined = jax.tree_util.tree_map_with_path(lambda path, _: leaves[_name(path)], fields)
    return TrainState(**joined) if isinstance(target, TrainState) else joined


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
