"""Whole curations: what stays, what is counted, the same output on any number of workers and after any stop."""

import errno
import json
from pathlib import Path

import pytest

from orogen.config.checks import ConfigError
from orogen.config.curate import ClassifyConfig, CurateConfig, DecontaminateConfig, DedupConfig, LanguageConfig
from orogen.data.compressed import opened
from orogen.data.curate import steps
from orogen.data.curate.execute import Resources, execute
from orogen.data.curate.run import curate, is_whole, passes, prepare, tidy
from orogen.data.curate.store import DocumentWriter, read_records
from orogen.data.curate.tally import Tally, merged
from orogen.data.curate.work import CONFIG, WORK

from .corpora import nearly, texts, write_jsonl

DEDUP = DedupConfig(bands=4, rows=3)
TEXTS = texts(12)


def run(config: CurateConfig, out: Path, *, workers: int = 1) -> dict:
    """The report of a curation run to its end."""
    curate(config, prepare(config, repr(config), out), Resources(workers=workers), lambda out, facts: None)
    tidy(out)
    return json.loads((out / "report.json").read_bytes())


def documents(out: Path) -> list[dict]:
    return [record for file in sorted((out / "documents").iterdir()) for record in read_records(file)]


def everything(out: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


@pytest.fixture
def sources(tmp_path):
    """Two sources: `web` has copies and near copies of what `books` has, and two of its own that are alike."""
    web = [TEXTS[0], nearly(TEXTS[1]), TEXTS[6], nearly(TEXTS[6]), TEXTS[7], {"wrong": 1}]
    write_jsonl(tmp_path / "in" / "web" / "1.jsonl.gz", web)
    write_jsonl(tmp_path / "in" / "web" / "2.jsonl", [TEXTS[8], TEXTS[0]])
    write_jsonl(tmp_path / "in" / "books" / "b.jsonl.zst", TEXTS[:6])
    (tmp_path / "in" / "web" / "notes.csv").write_text("not read")
    return (("books", str(tmp_path / "in" / "books")), ("web", str(tmp_path / "in" / "web")))


def test_copies_in_a_lesser_source_go_and_all_is_counted(sources, tmp_path):
    report = run(CurateConfig(sources=sources, stages=(DEDUP,), shard_bytes=1), tmp_path / "out")
    assert [d["id"] for d in documents(tmp_path / "out")] == [
        *(f"books/b.jsonl.zst:{i}" for i in range(1, 7)), "web/1.jsonl.gz:3", "web/1.jsonl.gz:5", "web/2.jsonl:1",
    ]  # fmt: skip
    removed = report["stages"]["dedup"]["removed"]
    assert {reason: found["documents"] for reason, found in removed.items()} == {
        "exact duplicate": 2, "fuzzy duplicate": 2,
    }  # fmt: skip
    assert removed["exact duplicate"]["bytes"] == 2 * len(TEXTS[0])
    assert removed["fuzzy duplicate"]["examples"][0]["text"].startswith("kept: books/b.jsonl.zst:2\n")
    assert report["stages"]["read"]["groups"]["source"]["web"]["documents"] == 7
    assert report["stages"]["write"]["left"] == {"documents": 9, "bytes": sum(len(TEXTS[i]) for i in range(9))}
    assert report["broken"] == {"records": 1, "reasons": {"no text field": 1}}
    assert json.loads((tmp_path / "out" / "broken.jsonl").read_text())["record"] == "6"
    assert report["skipped_files"] == {"books": 0, "web": 1} and report["files"] == 3
    assert report["dedup"]["components"] == 3 and report["dedup"]["largest_component"] == 3
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert [f["documents"] for f in manifest["files"]] == [6, 2, 1]


def test_the_order_of_sources_is_their_priority(sources, tmp_path):
    run(CurateConfig(sources=sources[::-1], stages=(DEDUP,)), tmp_path / "out")
    assert [d["id"] for d in documents(tmp_path / "out")] == [
        *(f"web/1.jsonl.gz:{i}" for i in (1, 2, 3, 5)), "web/2.jsonl:1",
        *(f"books/b.jsonl.zst:{i}" for i in (3, 4, 5, 6)),
    ]  # fmt: skip


def test_two_workers_and_other_shards_give_the_same_documents(sources, tmp_path):
    config = CurateConfig(sources=sources, stages=(DEDUP,), shard_bytes=1)
    run(config, tmp_path / "one")
    run(config, tmp_path / "two", workers=2)
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    run(CurateConfig(sources=sources, stages=(DEDUP,)), tmp_path / "large")
    assert documents(tmp_path / "large") == documents(tmp_path / "one")
    assert len(list((tmp_path / "large" / "documents").iterdir())) == 2  # a shard has files of one source


@pytest.mark.parametrize("stage", ["Keep", "Write"])
def test_a_run_that_a_full_disk_stopped_goes_on_to_the_same_output(stage, sources, tmp_path, monkeypatch):
    config = CurateConfig(sources=sources, stages=(DEDUP,), shard_bytes=1)
    run(config, tmp_path / "whole")
    write, count = DocumentWriter.write, 0

    def full(self, record):
        nonlocal count
        count += 1
        if count == {"Keep": 8, "Write": 13 + 7}[stage]:  # in the second shard of the pass
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, record)

    monkeypatch.setattr(DocumentWriter, "write", full)
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left"):
        run(config, out)
    assert not is_whole(out) and not (out / "documents").exists() and not list(out.rglob("*.tmp"))
    read: list[int] = []
    monkeypatch.setattr(steps, "load_inputs", lambda file, load=steps.load_inputs: read.append(1) or load(file))
    run(config, out)
    assert everything(out) == everything(tmp_path / "whole")
    assert len(read) == (2 if stage == "Keep" else 0)  # shards that were complete are not read again


def test_a_run_stopped_before_its_last_file_ends_the_same(sources, tmp_path):
    config = CurateConfig(sources=sources, stages=(DEDUP,))
    run(config, tmp_path / "whole")
    out = tmp_path / "out"
    work = prepare(config, repr(config), out)
    execute(passes(config, work, lambda out, facts: None), work, Resources())
    (out / "manifest.json").unlink()
    (work.logs("finish") / "completions" / "00000").unlink()
    assert not is_whole(out)
    run(config, out)
    assert everything(out) == everything(tmp_path / "whole")


def test_numbers_that_json_lacks_are_null(tmp_path):
    with DocumentWriter(tmp_path / "a.jsonl.zst") as out:
        out.write({"text": "a", "metadata": {"x": [float("inf"), 1.5], "y": float("nan"), "z": b"\xff"}})
    with opened(tmp_path / "a.jsonl.zst") as lines:
        [line] = lines
    found = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert found["metadata"] == {"x": [None, 1.5], "y": None, "z": "b'\\xff'"}


def test_parts_of_files_that_a_kill_left_are_no_output(sources, tmp_path):
    config = CurateConfig(sources=sources, stages=(DEDUP,))
    run(config, tmp_path / "whole")
    work = prepare(config, repr(config), out := tmp_path / "out")
    work.documents.mkdir(parents=True)
    for part in (work.documents / "000000.jsonl.zst.4194305.89abcdef.tmp", out / "report.json.4194305.89abcdef.tmp"):
        part.write_bytes(b"half")
    (out / "own.tmp").write_bytes(b"a file of somebody")
    run(config, out)
    tidy(out)
    tidy(tmp_path / "whole")
    (out / "own.tmp").unlink()
    assert everything(out) == everything(tmp_path / "whole")


def test_a_kill_within_the_first_file_leaves_a_folder_that_goes_on(sources, tmp_path):
    config = CurateConfig(sources=sources)
    (out := tmp_path / "out").mkdir()
    (out / f"{CONFIG}.4194305.89abcdef.tmp").write_bytes(b"half")
    prepare(config, repr(config), out)
    assert {file.name for file in out.iterdir()} == {CONFIG, WORK}


def test_a_file_that_vanishes_before_its_pass_is_named(sources, tmp_path):
    config = CurateConfig(sources=sources, stages=(DEDUP,))
    prepare(config, repr(config), tmp_path / "out")
    Path(sources[1][1], "2.jsonl").unlink()
    report = run(config, tmp_path / "out")
    assert report["broken"]["reasons"] == {"no text field": 1, "vanished": 1}
    assert len(documents(tmp_path / "out")) == 8


def test_an_output_folder_of_something_else_is_refused(sources, tmp_path):
    config = CurateConfig(sources=sources)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for out in (tmp_path / "other", tmp_path / "other" / "file"):
        with pytest.raises(ConfigError, match="not an empty folder"):
            prepare(config, "x", out)
    prepare(config, "x", tmp_path / "out")
    with pytest.raises(ConfigError, match="another config"):
        prepare(config, "y", tmp_path / "out")


@pytest.mark.parametrize(
    ("stages", "match"),
    [
        ((ClassifyConfig(good=("nowhere",), bad=("nowhere",)),), "ClassifyConfig.good: 'nowhere' does not exist"),
        ((DecontaminateConfig(evaluation=("nowhere",)),), "DecontaminateConfig.evaluation: 'nowhere' does not exist"),
    ],
)
def test_paths_are_checked_before_anything_is_written(stages, match, sources, tmp_path):
    with pytest.raises(FileNotFoundError, match=match):
        prepare(CurateConfig(sources=sources, stages=stages), "x", tmp_path / "out")
    with pytest.raises(ConfigError, match="has no file to read"):
        prepare(CurateConfig(sources=(("a", str(tmp_path / "in" / "web" / "notes.csv")),)), "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_classifier_and_evaluation_sets_of_a_run(tmp_path):
    good, bad = (texts(30, seed=seed) for seed in (1, 2))
    good = [text.replace("w1", "fine ") for text in good]
    write_jsonl(tmp_path / "good.jsonl", good)
    write_jsonl(tmp_path / "bad.jsonl", [*bad, b"{"])
    long = ". ".join([*good[:6], " ".join(bad[0].split()[:40]), *good[6:12]])
    write_jsonl(tmp_path / "web.jsonl", [good[20], bad[21], long])
    write_jsonl(tmp_path / "tests.jsonl", [{"question": " ".join(bad[0].split()[10:30]), "n": 1}])
    stages = (
        ClassifyConfig(good=(str(tmp_path / "good.jsonl"),), bad=(str(tmp_path / "bad.jsonl"),), features=1024),
        DecontaminateConfig(evaluation=(str(tmp_path / "tests.jsonl"),)),
    )
    config = CurateConfig(sources=(("web", str(tmp_path / "web.jsonl")),), stages=stages)
    report = run(config, tmp_path / "out")
    found = documents(tmp_path / "out")
    assert [d["id"] for d in found] == ["web/web.jsonl:1", "web/web.jsonl:3#0", "web/web.jsonl:3#1"]
    assert found[1]["text"] == ". ".join(good[:6]) + "." or found[1]["text"] == ". ".join(good[:5]) + "."
    assert report["stages"]["classify"]["removed"]["quality below 0.5"]["documents"] == 1
    assert report["classifier"]["accuracy"] > 0.8 and report["classifier"]["held_out"] == 6
    assert report["evaluation"] == {"ngrams": 8} and report["broken"]["reasons"] == {"malformed JSON": 1}
    assert report["stages"]["decontaminate"]["groups"]["decontaminate"]["documents split"]["documents"] == 1


def test_without_a_document_left_the_output_is_whole_and_empty(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [b"{", b"}"])
    stages = (LanguageConfig(), DEDUP, DecontaminateConfig(evaluation=(str(tmp_path / "a.jsonl"),)))
    report = run(CurateConfig(sources=(("a", str(tmp_path / "a.jsonl")),), stages=stages), tmp_path / "out")
    assert documents(tmp_path / "out") == [] and is_whole(tmp_path / "out")
    assert report["broken"]["records"] == 4 and report["dedup"]["components"] == 0


def test_a_half_written_file_never_gets_its_name(tmp_path):
    with pytest.raises(KeyError), DocumentWriter(tmp_path / "a.jsonl.zst") as out:
        out.write({"text": "one"})
        out.write({"no": "text"})
    assert list(tmp_path.iterdir()) == []


def test_tallies_of_shards_join_in_order():
    left, right = Tally(2), Tally(2)
    for tally, names in ((left, "a"), (right, "bc")):
        for name in names:
            tally.enter(5)
            tally.remove("short", 5, name=name, text="text")
    right.enter(9)
    right.leave(8, "web")
    total = merged([left.facts(), right.facts()], 2)
    assert total["entered"] == {"documents": 4, "bytes": 24} and total["left"] == {"documents": 1, "bytes": 8}
    assert [e["id"] for e in total["removed"]["short"]["examples"]] == ["a", "b"]
    assert total["removed"]["short"]["documents"] == 3 and total["lengths"] == {"4": 1}
    assert total["groups"] == {"source": {"web": {"documents": 1, "bytes": 8}}}
