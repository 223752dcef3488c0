"""Databases: what is nearest by hand, changes, what is refused, and near-copies that training must not see.

Letters: n entries, e embedding.
"""

import fcntl
import importlib.util
import json
import shutil
import types

import numpy as np
import pytest

from orogen.config.checks import ConfigError
from orogen.vision import database, index
from orogen.vision.database import Database, Entry, add, create, remove
from orogen.vision.retrieval import retrieve

NAMED = ("north", "east", "south", "north-east")
PLACE_NE = np.array([[0, 2.0, 0], [3, 0, 0], [0, -1, 0], [1, 1, 0]], np.float32)
needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="needs faiss: pip install 'orogen[vision]'"
)
KINDS = ["flat", pytest.param("ivf", marks=needs_faiss), pytest.param("hnsw", marks=needs_faiss)]


def encoder(fingerprint="abc", dimension=3):
    return types.SimpleNamespace(name="tiny", fingerprint=fingerprint, dimension=dimension)


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    entries = [Entry(name, f"{name}.png") for name in NAMED]
    create(tmp_path / "db", encoder(), PLACE_NE, entries, index=request.param)
    return tmp_path / "db"


def found(folder, query, k=4, **settings):
    return [hit.caption for hit in retrieve(Database(folder, encoder()), np.array([query], float), k, **settings)[0]]


def test_the_nearest_by_angle_come_first(folder):
    (hits,) = Database(folder, encoder()).search(np.array([[0.1, 5, 0]]), 3)
    assert [hit.caption for hit in hits] == ["north", "north-east", "east"]
    np.testing.assert_allclose(hits[1].score, (0.1 + 5) / np.sqrt(2) / np.hypot(0.1, 5), rtol=1e-6)
    assert [hit.id for hit in hits] == [0, 3, 1] and hits[0].source == "north.png"


def test_entries_are_added_and_removed_and_keep_their_ids(folder):
    assert add(folder, encoder(), np.array([[0, 0, 7.0]]), [Entry("up", "")]).entries == 5
    assert found(folder, [0, 0, 1], 1) == ["up"]
    assert remove(folder, [0, 2]).entries == 3
    assert found(folder, [0, 1, 0]) == ["north-east", *sorted(["east", "up"])]
    assert Database(folder).id_n.tolist() == [1, 3, 4]
    assert add(folder, encoder(), np.array([[0, 1.0, 0]]), [Entry("again", "")]).next_id == 6
    assert [path.name for path in folder.glob("version_*")] == ["version_000004"]


def test_an_empty_database_finds_nothing(folder):
    remove(folder, range(4))
    assert found(folder, [1, 0, 0]) == []
    add(folder, encoder(), np.array([[1.0, 0, 0]]), [Entry("one", "")])
    assert found(folder, [1, 0, 0]) == ["one"]


def test_near_copies_and_equal_captions_are_left_out_and_replaced(folder):
    assert found(folder, [0, 1, 0], 2, guard=0.99) == ["north-east", "east"]
    assert found(folder, [0, 1, 0], 1, captions=["  NORTH. "]) == ["north-east"]
    assert found(folder, [0, 1, 0], 2, guard=0.5, captions=["East"]) == ["south"]
    assert found(folder, [0, 1, 0], 1) == ["north"]


def recall(folder, query_be, k=10):
    """The share of the k nearest that an index finds."""
    opened = Database(folder)
    exact_bk, found = opened._exact(query_be.astype(np.float32), k), opened.search(query_be, k)
    pairs = zip(opened.id_n[exact_bk], found, strict=True)
    return np.mean([len(set(known.tolist()) & {hit.id for hit in hits}) / k for known, hits in pairs])


@needs_faiss
@pytest.mark.parametrize(("kind", "least"), [("ivf", 0.8), ("hnsw", 0.98)])
def test_indices_find_what_an_exact_search_finds(tmp_path, kind, least):
    """Of random embeddings, the hardest ones; also after entries have come, and after others have gone."""
    rng = np.random.default_rng(0)
    many_ne, query_be = rng.normal(size=(3000, 16)), rng.normal(size=(50, 16))
    entries = [Entry(str(n), "") for n in range(3000)]
    create(tmp_path / "db", encoder(dimension=16), many_ne[:2000], entries[:2000], index=kind)
    assert recall(tmp_path / "db", query_be) > least
    add(tmp_path / "db", encoder(dimension=16), many_ne[2000:], entries[2000:])
    assert recall(tmp_path / "db", query_be) > least
    truth = np.argmax(query_be @ (many_ne / np.linalg.norm(many_ne, axis=1, keepdims=True)).T, axis=1)
    nearest = [hits[0].id for hits in Database(tmp_path / "db").search(query_be, 5)]
    assert np.mean(nearest == truth) > least
    remove(tmp_path / "db", truth)
    assert recall(tmp_path / "db", query_be) > least
    assert not {hit.id for hits in Database(tmp_path / "db").search(query_be, 10) for hit in hits} & set(truth.tolist())


@needs_faiss
def test_an_hnsw_index_grows_and_is_built_anew_only_where_entries_go(tmp_path, monkeypatch):
    built, graph = [], index._graph
    monkeypatch.setattr(index, "_graph", lambda dimension: built.append(dimension) or graph(dimension))
    create(tmp_path / "db", encoder(), PLACE_NE, [Entry(name, "") for name in NAMED], index="hnsw")
    add(tmp_path / "db", encoder(), np.array([[0, 0, 7.0], [0, 0, -7.0]]), [Entry("up", ""), Entry("down", "")])
    assert built == [3] and found(tmp_path / "db", [0, 0, 1], 1) == ["up"] and len(Database(tmp_path / "db")) == 6
    remove(tmp_path / "db", [4])
    assert built == [3, 3] and found(tmp_path / "db", [0.1, 0.2, 1], 1) == ["north-east"]
    here = tmp_path / "db" / "version_000003" / "index.faiss"
    here.write_bytes(here.read_bytes()[:40])
    with pytest.raises(ConfigError, match="index.faiss cannot be read"):
        add(tmp_path / "db", encoder(), np.array([[0, 0, 7.0]]), [Entry("up", "")])


@needs_faiss
def test_the_content_of_an_hnsw_index_includes_its_graph(tmp_path):
    """Which neighbours a graph knows depends on what was added together, and so do the answers."""
    many_ne = np.random.default_rng(1).normal(size=(600, 4))
    entries = [Entry(str(n), "") for n in range(600)]
    contents, graphs = [], []
    for kind in ("hnsw", "flat"):
        for parts in ((600,), (600,), (200, 400)):
            folder, first = tmp_path / f"{kind}{len(contents)}", parts[0]
            facts = create(folder, encoder(dimension=4), many_ne[:first], entries[:first], index=kind)
            if parts[1:]:
                facts = add(folder, encoder(dimension=4), many_ne[first:], entries[first:])
            contents.append(facts.content)
            graphs += [(folder / f"version_{facts.version:06d}" / "index.faiss").read_bytes()] if kind == "hnsw" else []
    for one in range(3):
        for other in range(one):
            assert (contents[one] == contents[other]) == (graphs[one] == graphs[other])
    assert graphs[0] != graphs[2] and len(set(contents[3:])) == 1


def test_an_exact_search_goes_through_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "BLOCK", 7)
    rng = np.random.default_rng(1)
    many_ne, query_be = rng.normal(size=(40, 5)), rng.normal(size=(3, 5))
    create(tmp_path / "db", encoder(dimension=5), many_ne, [Entry(str(n), "") for n in range(40)], index="flat")
    unit_ne = many_ne / np.linalg.norm(many_ne, axis=1, keepdims=True)
    expected = np.argsort(-(query_be @ unit_ne.T), axis=1)[:, :6]
    assert [[hit.id for hit in hits] for hits in Database(tmp_path / "db").search(query_be, 6)] == expected.tolist()


def test_another_encoder_or_dimension_is_refused(tmp_path):
    create(tmp_path / "db", encoder(), PLACE_NE, [Entry(name, "") for name in NAMED], index="flat")
    for other in (encoder("xyz"), encoder("abc", 4)):
        with pytest.raises(ConfigError, match="is of encoder 'tiny'"):
            Database(tmp_path / "db", other)
    with pytest.raises(ConfigError, match="has no entry 9"):
        remove(tmp_path / "db", [9])
    with pytest.raises(ConfigError, match="not empty"):
        create(tmp_path / "db", encoder(), PLACE_NE, [], index="flat")
    with pytest.raises(ConfigError, match="expected one of flat, ivf, hnsw"):
        create(tmp_path / "new", encoder(), PLACE_NE, [], index="tree")
    with pytest.raises(ConfigError, match="not finite"):
        add(tmp_path / "db", encoder(), np.array([[np.nan, 0, 0]]), [Entry("", "")])
    with pytest.raises(ConfigError, match="has no database.json"):
        Database(tmp_path)


def test_a_damaged_database_is_refused(tmp_path):
    create(tmp_path / "db", encoder(), PLACE_NE, [Entry(name, "") for name in NAMED], index="flat")
    here = tmp_path / "db" / "version_000001"
    whole = (here / "records.jsonl").read_bytes()
    (here / "records.jsonl").write_bytes(whole[:-5])
    with pytest.raises(ConfigError, match="cut short"):
        Database(tmp_path / "db")
    for damaged in (whole.replace(b'"caption"', b'"captain"', 1), whole.replace(b'"', b"\xff", 1)):
        (here / "records.jsonl").write_bytes(damaged)
        opened = Database(tmp_path / "db")
        assert opened.entry(1).caption == NAMED[1]
        with pytest.raises(ConfigError, match="records.jsonl, entry 0") as caught:
            list(opened.entries())
        assert "\n" not in str(caught.value)
    (here / "records.jsonl").write_bytes(whole)
    kept = (here / "ids.npy").read_bytes()
    (here / "ids.npy").write_bytes(kept.replace(b"}", b"(", 1))  # in numpy's header
    with pytest.raises(ConfigError, match="ids.npy cannot be read"):
        Database(tmp_path / "db")
    (here / "ids.npy").write_bytes(kept)
    np.save(here / "embeddings.npy", PLACE_NE[:3])
    with pytest.raises(ConfigError, match=r"float32 \[3, 3\]; expected float32 \[4, 3\]"):
        Database(tmp_path / "db")
    facts = json.loads((tmp_path / "db" / "database.json").read_text())
    (tmp_path / "db" / "database.json").write_text(json.dumps({**facts, "dimension": "3"}))
    with pytest.raises(ConfigError, match="dimension is '3'"):
        Database(tmp_path / "db")


def many(tmp_path, count=300):
    rng = np.random.default_rng(2)
    embedding_ne = rng.normal(size=(count, 5))
    create(tmp_path / "db", encoder(dimension=5), embedding_ne, [Entry(str(n), "") for n in range(count)], index="flat")
    return Database(tmp_path / "db"), embedding_ne


def test_queries_are_searched_for_in_blocks_and_again_only_if_they_lack_some(tmp_path, monkeypatch):
    opened, embedding_ne = many(tmp_path)
    truth = retrieve(opened, embedding_ne, 3, guard=0.85, captions=[str(n) for n in range(300)])
    multiplied, asked, exact, search = [], [], opened._exact, opened.search
    monkeypatch.setattr(opened, "_exact", lambda query_be, k: multiplied.append(len(query_be)) or exact(query_be, k))
    monkeypatch.setattr(opened, "search", lambda query_be, k: asked.append(len(query_be)) or search(query_be, k))
    assert retrieve(opened, embedding_ne, 3, guard=0.85, captions=[str(n) for n in range(300)]) == truth
    unit_ne = embedding_ne / np.linalg.norm(embedding_ne, axis=1, keepdims=True)
    cosine_nn = unit_ne @ unit_ne.T
    order_nn = np.argsort(np.where(cosine_nn >= 0.85, -2, cosine_nn), axis=1)[:, ::-1][:, :3]
    assert [[hit.id for hit in hits] for hits in truth] == order_nn.tolist()
    assert max(multiplied) <= 256 and asked[0] == 256 and len(asked) > 2
    assert sum(asked) < 600  # not everything twice


def test_a_reader_keeps_the_version_that_it_has_opened(folder):
    opened = Database(folder, encoder())
    remove(folder, [0, 1])
    assert [hit.caption for hit in opened.search(np.array([[0, 1.0, 0]]), 2)[0]] == ["north", "north-east"]
    assert [entry.caption for entry in opened.entries()] == list(NAMED)


def test_a_version_removed_while_it_is_opened_is_looked_for_again(folder, monkeypatch):
    load = database._load

    def removed_first(file, *arguments):
        monkeypatch.setattr(database, "_load", load)
        remove(folder, [0])
        return load(file, *arguments)

    monkeypatch.setattr(database, "_load", removed_first)
    assert len(Database(folder, encoder())) == 3


def test_one_process_changes_a_database_at_a_time(tmp_path):
    create(tmp_path / "db", encoder(), PLACE_NE, [Entry(name, "") for name in NAMED], index="flat")
    with (tmp_path / "db" / "database.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for change in (
            lambda: add(tmp_path / "db", encoder(), PLACE_NE[:1], [Entry("more", "")]),
            lambda: remove(tmp_path / "db", [0]),
        ):
            with pytest.raises(ConfigError, match="being written by another process"):
                change()
    assert remove(tmp_path / "db", [0]).entries == 3


def test_a_version_that_cannot_be_written_is_removed_again(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(database, "write_index", full)
        patch.setattr(index, "_faiss", lambda: None)
        with pytest.raises(OSError, match="disk full"):
            create(tmp_path / "db", encoder(), PLACE_NE, [Entry(name, "") for name in NAMED], index="hnsw")
    assert not list((tmp_path / "db").glob("version_*"))
    assert create(tmp_path / "db", encoder(), PLACE_NE, [Entry(n, "") for n in NAMED], index="flat").entries == 4


def test_the_hash_is_of_the_content(tmp_path):
    hashes = {}
    for name, captions in (("a", NAMED), ("same", NAMED), ("other", ("up", *NAMED[1:]))):
        entries = [Entry(caption, "") for caption in captions]
        hashes[name] = create(tmp_path / name, encoder(), PLACE_NE, entries, index="flat").content
    assert hashes["a"] == hashes["same"] != hashes["other"]
    shutil.rmtree(tmp_path / "other")
    moved = create(tmp_path / "other", encoder(), PLACE_NE[::-1], [Entry(name, "") for name in NAMED], index="flat")
    assert moved.content != hashes["a"]
