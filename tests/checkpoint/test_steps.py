"""Damaged checkpoints are found and named, and so is the latest undamaged one before them."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from orogen.checkpoint import checksums
from orogen.checkpoint.steps import MARKER, Checkpoints, NotSavedError
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.model.layout import Whole
from orogen.train.state import TrainState, items

# The layout of a model that is not split into stages.
WHOLE = Whole("", "")
POSITION = {"position": {"row": 3}, "identity": {"seed": 1}}


def state(step: int) -> TrainState:
    number = jnp.asarray(step, jnp.int32)
    params = {"w": jnp.arange(6.0).reshape(2, 3) + step}
    return TrainState(number, number * 0, number * 0, params, {"b": jnp.ones(5)}, {"m": jnp.zeros((2, 3))})


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A run folder with checkpoints 4 and 8, the last two of three."""
    folder = tmp_path_factory.mktemp("written") / "run"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (2, 4, 8):
            checkpoints.save(step, items(state(step)), POSITION, WHOLE)
    return folder


@pytest.fixture
def copy(written, tmp_path) -> Path:
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def restore(folder: Path, how: str = "restore") -> None:
    with Checkpoints(folder) as checkpoints:
        if how == "layout":
            checkpoints.layout(WHOLE)
        elif how == "tokenizer":
            checkpoints.check_tokenizer()
        else:
            restored, position = checkpoints.restore(items(state(0)))
            assert position == POSITION
            step = int(restored["trainer"]["step"])
            assert restored["model"]["params"]["w"].tolist() == state(step).params["w"].tolist()


def refusal(folder: Path, how: str = "restore") -> str:
    with pytest.raises(ConfigError) as caught:
        restore(folder, how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_newest_are_kept_and_the_last_is_read(written):
    assert steps(written) == ["4", "8"]
    restore(written)


def test_the_list_is_what_sha256sum_writes(written):
    newest = written / "checkpoints" / "8"
    head, *lines = (newest / checksums.NAME).read_text().splitlines()
    names = [line.split("  ", 1)[1] for line in lines]
    files = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    assert set(names) == files - {checksums.NAME}
    for line in lines:
        digest, name = line.split("  ", 1)
        assert digest == hashlib.sha256((newest / name).read_bytes()).hexdigest()
    assert head.endswith(hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest())


@pytest.mark.parametrize("how", ["restore", "layout", "tokenizer"])
def test_one_flipped_bit_in_any_file_is_found_and_named(copy, how):
    newest = copy / "checkpoints" / "8"
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 15
    for number, path in enumerate(files):
        original = path.read_bytes()
        byte = number * 7919 % len(original)
        path.write_bytes(original[:byte] + bytes([original[byte] ^ 1 << number % 8]) + original[byte + 1 :])
        message = refusal(copy, how)
        assert str(path) in message and f"{copy / 'checkpoints' / '4'} is undamaged" in message
        path.write_bytes(original)
    restore(copy)


@pytest.mark.parametrize("damage", ["half", "zeros", "empty", "missing"])
def test_files_that_are_truncated_zeroed_or_missing_are_named(copy, damage):
    newest = copy / "checkpoints" / "8"
    for path in [path for path in newest.rglob("*") if path.is_file() and path.name != MARKER]:
        original = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            size = len(original)
            path.write_bytes({"half": original[: size // 2], "zeros": bytes(size), "empty": b""}[damage])
        assert str(path) in refusal(copy)
        path.write_bytes(original)


def test_the_lack_of_an_undamaged_checkpoint_is_stated(copy):
    for step in ("4", "8"):
        (copy / "checkpoints" / step / "data" / "metadata").write_text("{}")
    assert refusal(copy).endswith("no checkpoint before it is undamaged")


def test_orbaxs_marker_does_not_make_a_checkpoint_complete(copy):
    newest = copy / "checkpoints" / "8"
    (newest / MARKER).unlink()
    restore(copy)  # its checksums do
    (newest / "model" / "_METADATA").write_bytes(b"{")
    assert "_METADATA is damaged" in refusal(copy)


def test_a_checkpoint_of_an_earlier_release_is_read_and_one_line_says_so(copy, capsys):
    newest = copy / "checkpoints" / "8"
    (newest / checksums.NAME).unlink()
    assert f"{newest / checksums.NAME} is missing" in refusal(copy)  # `about` says that it has them
    for item in ("layout", "about"):
        shutil.rmtree(newest / item)
    capsys.readouterr()
    restore(copy)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "has no checksums" in err
    (newest / MARKER).unlink()
    assert f"neither {checksums.NAME} nor {MARKER}" in refusal(copy)


@pytest.mark.parametrize(
    "data",
    ["[]", "3", "{", "null", "[" * 100_000],
)
def test_malformed_positions_are_refused(copy, data):
    without_checksums(copy, "data", data)
    assert str(copy / "checkpoints" / "8" / "data" / "metadata") in refusal(copy)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("stages", [{"patterns": 3}, 7, "x", {"patterns": ["M"], "mtp": "", "stages": 2}], ids=str)
def test_malformed_stages_are_refused(copy, stages, earlier):
    """In the layout, and where an earlier release kept them."""
    without_checksums(copy, "layout", json.dumps({"stages": stages}))
    if earlier:
        without_checksums(copy, "data", json.dumps(POSITION | {"stages": stages}))
        for step, item in itertools.product(("4", "8"), ("layout", "about")):
            shutil.rmtree(copy / "checkpoints" / step / item)
    assert f"{copy / 'checkpoints' / '8'} has the stages" in refusal(copy, "layout")


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"vocab_size": 0}', '{"vocab_size": "many"}'])
def test_malformed_layouts_are_refused(copy, content):
    without_checksums(copy, "layout", content)
    assert str(copy / "checkpoints" / "8") in refusal(copy, "layout")


def test_a_missing_layout_is_refused(copy):
    without_checksums(copy, "data", json.dumps(POSITION))
    for step in ("4", "8"):
        shutil.rmtree(copy / "checkpoints" / step / "layout")
    assert f"{copy / 'checkpoints' / '8' / 'layout' / 'metadata'} is missing" in refusal(copy, "layout")


def without_checksums(folder: Path, item: str, content: str) -> None:
    """Rewrites an item of both checkpoints and removes their checksums, so that only the item's reader can notice."""
    for step in ("4", "8"):
        checkpoint = folder / "checkpoints" / step
        (checkpoint / checksums.NAME).unlink(missing_ok=True)
        (checkpoint / "about" / "metadata").write_text('{"tokenizer_files": {}}')
        (checkpoint / item / "metadata").write_text(content)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "null", '{"tree_metadata": 3}', '{"tree_metadata": {"a": []}}', "["]
)
@pytest.mark.parametrize("name", ["model/_METADATA", "trainer/_METADATA", "_CHECKPOINT_METADATA"])
def test_malformed_metadata_are_refused_without_checksums_too(copy, content, name):
    newest = copy / "checkpoints" / "8"
    (newest / checksums.NAME).unlink()
    for item in ("layout", "about"):
        shutil.rmtree(newest / item)
    (newest / name).write_text(content)
    if name == "_CHECKPOINT_METADATA":
        return restore(copy)  # nothing reads it
    refusal(copy)


def test_a_state_is_not_restored_into_another_model(tmp_path):
    """Although config.gin states the model of the run that goes on."""
    sizes = {"pattern": "-", "vocab_size": 6, "hidden_size": 2, "intermediate_size": 3}
    models = [ModelConfig(**sizes, mlp_hidden_act=name) for name in ("relu2", "gelu_tanh")]
    with Checkpoints(tmp_path, model=models[0]) as checkpoints:
        checkpoints.save(2, items(state(2)), POSITION, WHOLE)
    with Checkpoints(tmp_path, model=models[1]) as checkpoints:
        with pytest.raises(ConfigError, match="mlp_hidden_act is 'gelu_tanh'; expected 'relu2', as in checkpoint 2"):
            checkpoints.restore(items(state(0)))


def test_what_a_killed_process_left_is_ignored_and_removed(copy):
    folder = copy / "checkpoints"
    for left in ("12.partial", "12.partial.orbax-checkpoint-tmp", "2.removed", "12.orbax-checkpoint-tmp-3"):
        shutil.copytree(folder / "4", folder / left)
    with Checkpoints(copy, keep=2) as checkpoints:
        assert checkpoints.latest == 8
        checkpoints.save(12, items(state(12)), POSITION, WHOLE)
    assert steps(copy) == ["12", "8"]


def test_a_checkpoint_that_was_moved_away_stays(copy):
    folder = copy / "checkpoints"
    (folder / "8").rename(folder / "8.damaged")
    shutil.copytree(folder / "4", folder / "old")
    with Checkpoints(copy) as checkpoints:
        checkpoints.save(9, items(state(9)), POSITION, WHOLE)
    assert steps(copy) == ["4", "8.damaged", "9", "old"]
    assert (folder / "8.damaged" / checksums.NAME).is_file()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: out of memory")])
def test_a_lack_of_memory_is_not_reported_as_damage(copy, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(Checkpoints, "_item", fail)
    with pytest.raises(type(error)) as caught:
        restore(copy)
    assert caught.value is error


def test_a_write_that_fails_is_raised_and_removes_nothing(copy, monkeypatch):
    def fail(folder):
        raise OSError(28, "No space left on device")

    said = "checkpoint 12 could not be written to .*/checkpoints: No space left on device; checkpoint 8 is the last"
    with Checkpoints(copy, keep=1) as checkpoints:
        with monkeypatch.context() as patched:
            patched.setattr(checksums, "write", fail)
            checkpoints.save(12, items(state(12)), POSITION, WHOLE)
            with pytest.raises(NotSavedError, match=said):
                checkpoints.wait()
        assert steps(copy) == ["4", "8"]
        checkpoints.save(12, items(state(12)), POSITION, WHOLE)  # the same step again, once there is space
    assert steps(copy) == ["12"]


def test_a_full_disk_keeps_what_is_there_and_a_later_write_succeeds(copy):
    """A real one; the second checkpoint does not fit on it."""
    mount = copy / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounts a small file system: run this test as root, with the right to mount")
    large = {"model": {"w": jnp.asarray(np.random.default_rng(0).normal(size=2**18), jnp.float32)}}  # 1 MiB
    try:
        with Checkpoints(mount) as checkpoints:
            checkpoints.save(1, large, POSITION, WHOLE)
            checkpoints.wait()
            free = os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize
            (mount / "filler").write_bytes(bytes(free - 2**19))
            checkpoints.save(2, large, POSITION, WHOLE)
            with pytest.raises(NotSavedError, match=r"checkpoint 2 .*: No space left on device; checkpoint 1 is"):
                checkpoints.wait()
            assert steps(mount) == ["1"]
            (mount / "filler").unlink()
            checkpoints.save(2, large, POSITION, WHOLE)
        assert steps(mount) == ["1", "2"]
        checksums.check(mount / "checkpoints" / "1")
    finally:
        subprocess.run(["umount", mount], check=True)


def test_the_best_and_the_last_regular_checkpoint_stay_beside_the_last_ones(tmp_path):
    with Checkpoints(tmp_path, keep=1, every=4) as checkpoints:
        for step in (3, 4, 5, 6):
            checkpoints.save(step, items(state(step)), POSITION, WHOLE, best=step in (3, 6))
            checkpoints.wait()
            assert steps(tmp_path) == {3: ["3"], 4: ["3", "4"], 5: ["3", "4", "5"], 6: ["4", "6"]}[step]
        assert (checkpoints.regular(4), checkpoints.regular(3), checkpoints.regular(5)) == (4, 6, 0)
        checkpoints.remove_after(5)
        assert steps(tmp_path) == ["4"] and checkpoints.latest == 4
        checkpoints.save(6, items(state(6)), POSITION, WHOLE)
    assert steps(tmp_path) == ["4", "6"]


def test_only_tensorstores_echoes_of_a_failed_write_are_silent(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    before = sys.unraisablehook
    echo, other = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "another"))
    with Checkpoints(tmp_path):
        sys.unraisablehook(echo)
        sys.unraisablehook(other)
    assert seen == [other] and sys.unraisablehook == before
