"""A run's checkpoints: orbax writes them in the background, and a few are kept.

A checkpoint is the folder `checkpoints/STEP` with the items model, trainer, layout, about and data. The model is a
separate item, so that a reader can restore it without the optimizer. Arrays are saved in the layout that they have on
the devices, which `layout` describes, and with the padding rows of the vocabulary; a restore adds or drops such rows.
about: the model's config and the tokenizer's files. data: the position of the source of batches, and nothing else.
A folder named STEP is complete: orbax writes into `STEP.partial`, which is renamed once it has its checksums. Folders
of release 0.8.0 have the layout within data, and no checksums; orbax's marker shows that they are complete.
"""

import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from orogen.checkpoint import checksums, facts, outcome
from orogen.checkpoint.facts import AnotherModelError
from orogen.config.checks import ConfigError, is_unicode
from orogen.config.model import ModelConfig
from orogen.config.streams import say
from orogen.model.layout import Layout, Whole
from orogen.model.vocabulary import vocab_dim
from orogen.parallel import distributed

# The trees of arrays that a checkpoint holds as separate items, by name. Readers rely on the name of the model's.
Items = Mapping[str, Any]
MODEL_ITEM = "model"
MARKER = "commit_success.txt"
PARTIAL, REMOVED = ".partial", ".removed"
# Names of folders that a killed process may leave; others belong to the user, such as a damaged checkpoint moved away.
LEFT = re.compile(rf"\d+({re.escape(PARTIAL)}|{re.escape(REMOVED)}|\.orbax-checkpoint-tmp.*)+")


class NotSavedError(RuntimeError):
    """A checkpoint could not be written, for example to a full disk. Those before it are as they were."""


class Checkpoints:
    """The checkpoints of a run folder. Use as a context manager: leaving it waits for pending writes.

    keep: how many of the last checkpoints to keep; None: all. every: if given, the last checkpoint of a step that
    is a multiple of it stays too. model: its config is written into each checkpoint, and `restore` compares it.
    vocab_size: the model's, padding rows not counted; None: that of `model`, else that of the arrays. best: the
    step of the best checkpoint, which stays until a better one is complete. only: the step to read, if it is not
    the latest. together: whether all processes call each method at once, as `save` requires if there are several.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        keep: int | None = None,
        every: int | None = None,
        model: ModelConfig | None = None,
        vocab_size: int | None = None,
        only: int | None = None,
        together: bool = False,
    ):
        self.run_dir = Path(run_dir).resolve()
        self.vocab_size = model.vocab_size if vocab_size is None and model is not None else vocab_size
        self.folder = self.run_dir / "checkpoints"
        if not is_unicode(str(self.folder)):  # tensorstore accepts no others
            raise ConfigError(f"run folder {str(run_dir)!r}; expected a path in UTF-8")
        self._keep, self._every, self._model, self._together = keep, every, model, together
        self._only, self.best = only, None
        self._writer: ocp.AsyncCheckpointer | None = None
        self._finisher = ThreadPoolExecutor(1)
        self._finishing: Future[None] | None = None
        self._written: int | None = None
        self._done, self._unclean = "", True
        self._checked: set[int] = set()

    def __enter__(self) -> "Checkpoints":
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            if self._writer is not None:
                self._writer.close()
            sys.unraisablehook = self._hook

    def _unraisable(self, dropped: Any) -> None:
        """The hook that Python calls for exceptions that nobody can catch."""
        # After one write of a checkpoint has failed, orbax closes its event loop, and tensorstore reports each of the
        # others with a traceback (observed with orbax 0.12.8). `wait` raises the failure itself.
        if not isinstance(dropped.exc_value, RuntimeError) or str(dropped.exc_value) != "Event loop is closed":
            self._hook(dropped)

    @property
    def latest(self) -> int | None:
        """The last step whose folder is complete, or `only`; None without one."""
        return max((step for step in self._steps() if self._only in (None, step)), default=None)

    def layout(self, whole: Whole) -> Layout:
        """The layout of the layers `whole` in the latest checkpoint. Raises ConfigError if there is no checkpoint, or
        if it is of other layers."""
        return self._read(lambda step: facts.read_layout(self.folder / str(step), whole))

    def save(self, step: int, items: Items, position: dict[str, Any], layout: Layout, *, best: bool = False) -> None:
        """Starts writing the items after step `step`, which are in the layout `layout`, and the position of the data:
        returns once the arrays are copied to the host and the write before this one is finished. best: whether it is
        better than the checkpoint `best`. Does nothing if the latest checkpoint is of that step. Raises NotSavedError
        if this write cannot be started or the one before it failed.
        """
        self.wait()
        if self._together:
            distributed.from_all(None)  # a process on which the last write failed early meets the others here
        if self._agreed(lambda: step in (self.latest, self._written)):
            return
        about = facts.about_facts(self.run_dir, self._model)  # first: an unreadable tokenizer leaves no folder
        partial = self.folder / f"{step}{PARTIAL}"
        args = ocp.args.Composite(
            **{name: ocp.args.StandardSave(_named(tree)) for name, tree in items.items()},
            layout=ocp.args.JsonSave(facts.layout_facts(layout, self.vocab_size)),
            about=ocp.args.JsonSave(about),
            data=ocp.args.JsonSave(position),
        )
        done = distributed.fresh_name("checkpoint") if self._together else ""  # on all, whatever fails
        try:
            if self._unclean:
                self._agreed(self._clear)
                self._unclean = False
            self._writer = self._writer or outcome.new_writer(lambda: self._done)
            self._done = done
            self._writer.save(partial, args=args)
        except OSError as error:
            outcome.failed(done)
            self._unclean = True
            raise self._not_saved(step, error) from error
        self._written = step
        self._finishing = self._finisher.submit(self._finish, partial, step, best, done)

    def wait(self) -> None:
        """Waits for pending writes. Raises NotSavedError if one fails; what it left is removed."""
        if self._finishing is None:
            return
        finishing, self._finishing = self._finishing, None
        try:
            finishing.result()
        except Exception as error:  # orbax and tensorstore raise errors of any type
            step, self._written, self._unclean = self._written, None, True
            raise self._not_saved(step, error) from error

    def has(self, step: int) -> bool:
        """Whether the checkpoint of this step is complete or being written."""
        return step == self._written or (self.folder / str(step)).is_dir()

    def remove_after(self, step: int, *, files: bool = True) -> None:
        """Removes the checkpoints of later steps, the last one first. files: False if another process removes them."""
        self.wait()
        self._written = None
        for later in reversed(self._steps()) if files else ():
            if later > step:
                self._remove(later)

    def regular(self, every: int) -> int:
        """The last step with a complete checkpoint that is a multiple of `every`; 0 without one."""
        return max((step for step in self._steps() if step % every == 0), default=0)

    def restore(self, items: Items) -> tuple[dict[str, Any], dict[str, Any]]:
        """The items of the latest checkpoint, and the position of the data. items: abstract arrays with the shardings
        and dtypes to restore to. Raises ConfigError, also if the checkpoint is of another model."""

        def read(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
            if self._model is not None:
                facts.check_model(self.folder / str(step), self._model, self.run_dir / "config.gin")
            found = {name: self._item(step, name, target) for name, target in items.items()}
            return found, facts.read_position(self.folder / str(step))

        return self._read(read)

    def restore_model(self, config: ModelConfig, target: Callable[[Layout], Any]) -> tuple[Layout, Any]:
        """The layout of the latest checkpoint, and its model item alone. config: the model that the run folder's config
        states. target: maps the layout to abstract arrays as in `restore`. Raises ConfigError, also if the checkpoint
        is of another model."""

        def read(step: int) -> tuple[Layout, Any]:
            facts.check_model(self.folder / str(step), config, self.run_dir / "config.gin")
            layout = facts.read_layout(self.folder / str(step), Whole(config.layers.main, config.layers.mtp))
            return layout, self._item(step, MODEL_ITEM, target(layout))

        return self._read(read)

    def check_tokenizer(self) -> None:
        """Raises ConfigError unless the run folder's tokenizer is that of the latest checkpoint."""
        if self.latest is not None:
            self._read(lambda step: facts.check_tokenizer(self.folder / str(step), self.run_dir / "tokenizer"))

    def _agreed(self, work: Callable[[], Any]) -> Any:
        """`work()`, done by the first process for all of them if they are here together."""
        return distributed.from_first(work) if self._together else work()

    def _clear(self) -> None:
        """Makes the folder, and removes what a killed process left there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_left()

    def _finish(self, partial: Path, step: int, best: bool, done: str) -> None:
        """Turns the folder that orbax is writing into a checkpoint, then removes the oldest checkpoints. Of several
        processes, the first does, once orbax has the parts of all; the others wait for that."""
        assert self._writer is not None
        with outcome.shared(done, step):
            outcome.wait(self._writer, done)
            if distributed.first():
                self._complete(partial, step, best)

    def _complete(self, partial: Path, step: int, best: bool) -> None:
        checksums.write(partial)
        partial.rename(self.folder / str(step))
        self.best = step if best else self.best
        kept = {self.best, self.regular(self._every) if self._every else None}
        # The newest, which is complete, is never removed.
        for old in self._steps()[: -self._keep] if self._keep else ():
            if old not in kept:
                self._remove(old)

    def _remove(self, step: int) -> None:
        shutil.rmtree((self.folder / str(step)).rename(self.folder / f"{step}{REMOVED}"))

    def _remove_left(self) -> None:
        """Removes what writes that did not end have left."""
        for left in self.folder.iterdir():
            if LEFT.fullmatch(left.name) and left.is_dir():
                shutil.rmtree(left, ignore_errors=True)  # on a disk that is not writable, it is ignored as it is

    def _not_saved(self, step: int | None, error: Exception) -> NotSavedError:
        if distributed.first() and self.folder.is_dir():
            self._remove_left()
        kept = f"checkpoint {self.latest} is the last" if self.latest else "there is none before it"
        return NotSavedError(
            f"checkpoint {step} could not be written to {self.folder}: {outcome.reason(error)}; {kept}"
        )

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def _read(self, read: Callable[[int], Any]) -> Any:
        """Checks the latest checkpoint for damage, then calls `read` with its step. Raises ConfigError that names the
        damaged file and the latest undamaged checkpoint before it."""
        while True:
            step = self._agreed(lambda: self.latest)
            if step is None:
                raise ConfigError(f"{self.folder} holds no complete checkpoint; expected at least one")
            try:
                self._agreed(lambda step=step: self._check_whole(step))
                return read(step)
            except (AnotherModelError, MemoryError):
                raise
            except Exception as error:  # orbax, tensorstore and jax raise errors of any type on a damaged file
                if self.latest != step:  # a run in progress has removed it meanwhile
                    continue
                if "RESOURCE_EXHAUSTED" in str(error):  # jax's out-of-memory error: the files are not to blame
                    raise
                folder, reason = self.folder / str(step), " ".join(str(error).split())[:300]
                if not isinstance(error, ConfigError):
                    kind = type(error).__name__
                    reason = f"{folder} cannot be read ({kind}: {reason}); expected a complete checkpoint"
                raise ConfigError(f"{reason}; {self._before(step)}") from error

    def _before(self, step: int) -> str:
        for earlier in reversed(self._steps()):
            if earlier < step:
                try:
                    self._check_whole(earlier)
                except ConfigError:
                    continue
                undamaged, damaged = self.folder / str(earlier), self.folder / str(step)
                return f"{undamaged} is undamaged and is used once {damaged} is moved away"
        return "no checkpoint before it is undamaged"

    def _check_whole(self, step: int) -> None:
        """Raises ConfigError naming the first file of checkpoint `step` that is missing or damaged."""
        if step in self._checked:
            return
        folder = self.folder / str(step)
        if (folder / checksums.NAME).exists():
            checksums.check(folder, optional=MARKER)
        elif facts.LISTED in facts.read_facts(folder, "about"):
            raise ConfigError(f"{folder / checksums.NAME} is missing; expected it in a complete checkpoint")
        elif not (folder / MARKER).is_file():
            expected = "expected one in a complete checkpoint"
            raise ConfigError(f"{folder} has neither {checksums.NAME} nor {MARKER}; {expected}")
        else:
            say(f"{folder} has no checksums, since an earlier release wrote it; its bytes are not checked")
        self._checked.add(step)

    def _item(self, step: int, item: str, target: Any) -> Any:
        """Restores the arrays of an item onto the tree `target` of abstract arrays."""
        self._check(step, item, target)
        # Not strict: padding rows of the vocabulary that the checkpoint lacks become zeros, surplus ones are dropped.
        arguments = ocp.args.StandardRestore(_named(target), strict=False)
        folder: Any = self.folder / str(step) / item  # typed as a path of etils
        leaves: Any = ocp.StandardCheckpointHandler().restore(folder, args=arguments)
        return jax.tree_util.tree_map_with_path(lambda path, _: leaves[_name(path)], target)

    def _check(self, step: int, item: str, target: Any) -> None:
        """Raises ConfigError naming the first array that is missing, surplus or of another shape; padding rows of the
        vocabulary do not count."""
        folder: Any = self.folder / str(step) / item
        saved: Any = ocp.StandardCheckpointHandler().metadata(folder)
        saved, wanted, dims = getattr(saved, "tree", saved), _named(target), _vocab_dims(target)
        recorded = facts.read_facts(self.folder / str(step), "layout").get(facts.VOCABULARY)
        for name in sorted(set(saved) | set(wanted)):
            have = _filled_from(saved[name].shape, dims.get(name), recorded) if name in saved else "nothing"
            want = _filled_from(wanted[name].shape, dims.get(name), self.vocab_size) if name in wanted else "nothing"
            if have != want:
                raise AnotherModelError(f"{self.folder} is of another model: {name} is {have}; expected {want}")


def _vocab_dims(tree: Any) -> dict[str, int | None]:
    """The dimension of each leaf over the vocabulary, counted from the last, or None, by the leaf's name."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {_name(path): vocab_dim(leaf) if isinstance(leaf, nnx.Variable) else None for path, leaf in found}


def _filled_from(shape: Sequence[int], dim: int | None, vocab_size: int | None) -> tuple[int, ...]:
    """The shape without padding rows beyond `vocab_size`, if that is known."""
    kept = list(shape)
    if dim is not None and vocab_size is not None:
        kept[dim] = min(kept[dim], vocab_size)
    return tuple(kept)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Abstract arrays that carry their sharding."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, so that the files do not depend on Python classes."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
