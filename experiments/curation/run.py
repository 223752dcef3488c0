"""Near-duplicates planted at known Jaccard indices, two versions of the standard library, and the loss after curation.

python experiments/curation/run.py curve
python experiments/curation/run.py stdlib --old /path/to/lib/python3.11 --new /path/to/lib/python3.12
python experiments/curation/run.py speed
python experiments/curation/run.py loss
python experiments/curation/run.py draw
"""

import argparse
import base64
import json
import random
import re
import sysconfig
import tempfile
import time
from collections import defaultdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from orogen import cli
from orogen.config.curate import ClassifyConfig, CurateConfig, DecontaminateConfig, DedupConfig
from orogen.data.curate.duplicates import band_pairs
from orogen.data.curate.execute import Resources, execute
from orogen.data.curate.minhash import candidate_probability, signatures
from orogen.data.curate.run import curate, passes, prepare
from orogen.data.curate.words import shingles

HERE = Path(__file__).parent
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
SEEDS = (0, 1, 2)
STEPS = 160  # as in model.gin
ARMS = ("raw", "dedup", "filter", "dedup+filter", "all")


def grams(text: str, n: int = 5) -> frozenset[tuple[str, ...]]:
    """The set of n-grams of words, as brute force compares them."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1)))


def similar_pairs(texts: list[str], least: float) -> dict[tuple[int, int], float]:
    """Every pair with a Jaccard index of at least `least` > 0, by counting the shingles of pairs that share any."""
    sets = [grams(text) for text in texts]
    holders: dict[Any, list[int]] = defaultdict(list)
    shared: dict[tuple[int, int], int] = defaultdict(int)
    for number, one in enumerate(sets):
        for gram in one:
            for other in holders[gram]:
                shared[other, number] += 1
            holders[gram].append(number)
    found = {(i, j): count / (len(sets[i]) + len(sets[j]) - count) for (i, j), count in shared.items()}
    return {pair: jaccard for pair, jaccard in found.items() if jaccard >= least}


def found_pairs(texts: list[str], config: DedupConfig) -> set[tuple[int, int]]:
    """The pairs that the bands find."""
    rows = signatures([shingles(text, config.shingle) for text in texts], config)
    bands = [band_pairs(rows, band, config).pairs_e2.tolist() for band in range(config.bands)]
    return {(min(pair), max(pair)) for band in bands for pair in band}


def planted(level: float, draw: random.Random) -> tuple[str, str]:
    """Two texts of 300 words whose sets of shingles have nearly this index: some words in the middle are replaced."""
    words = [f"w{draw.randrange(10**6)}" for _ in range(300)]
    shared = 2 * 296 * level / (1 + level)
    replaced = max(round(296 - shared) - 4, 0)
    other = [*words[:100], *(f"w{draw.randrange(10**6)}" for _ in range(replaced)), *words[100 + replaced :]]
    return " ".join(words), " ".join(other)


def curve(record: Any) -> None:
    for seed in SEEDS:
        draw = random.Random(seed)
        config = DedupConfig(jaccard=0.0, seed=seed)
        for level in LEVELS:
            pairs = [planted(level, draw) for _ in range(1500)]
            texts = [text for pair in pairs for text in pair]
            exact = float(np.mean([len(grams(a) & grams(b)) / len(grams(a) | grams(b)) for a, b in pairs[:20]]))
            hits = {(i, j) for i, j in found_pairs(texts, config) if i % 2 == 0 and j == i + 1}
            expected = float(candidate_probability(exact, config))
            record(part="curve", seed=seed, jaccard=exact, measured=len(hits) / len(pairs), expected=expected)
        texts = [text for _ in range(1500) for text in planted(draw.uniform(0.5, 1.0), draw)]
        record(part="recall", seed=seed, jaccard=None, **compare(texts, DedupConfig(jaccard=0.0, seed=seed)))
        record(part="recall", seed=seed, jaccard=0.8, **compare(texts, DedupConfig(seed=seed)))


def compare(texts: list[str], config: DedupConfig) -> dict[str, Any]:
    """Precision and recall of the pairs found, against all pairs with an index of at least 0.8."""
    truth, found = similar_pairs(texts, 0.8), found_pairs(texts, config)
    right = len(found & set(truth))
    return {"pairs": len(truth), "found": len(found), "precision": right / len(found), "recall": right / len(truth)}


def modules(folder: Path) -> dict[str, str]:
    """The library's modules by their paths, without tests and installed packages."""
    left_out = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    files = [file for file in sorted(folder.rglob("*.py")) if left_out.isdisjoint(file.relative_to(folder).parts)]
    read = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    return {name: data.decode() for name, data in read.items() if utf8(data)}


def utf8(data: bytes) -> bool:
    try:
        return bool(data.decode().strip())
    except UnicodeDecodeError:
        return False


def stdlib(old: Path, new: Path, record: Any) -> None:
    versions = {"new": modules(new), "old": modules(old)}
    common = [name for name in versions["new"] if name in versions["old"]]
    same = sum(versions["new"][name] == versions["old"][name] for name in common)
    keys = [(version, name) for version, files in versions.items() for name in files]
    texts = [versions[version][name] for version, name in keys]
    truth = similar_pairs(texts, 0.8)
    across = {(keys[i][1], keys[j][1]) for i, j in truth if keys[i][0] != keys[j][0]}
    alike = sum((name, name) in across for name in common)
    record(
        part="stdlib", common=len(common), same=same, alike=alike, documents=len(texts), **compare(texts, DedupConfig())
    )
    with tempfile.TemporaryDirectory() as folder:
        for version, files in versions.items():
            write(Path(folder, version, "modules.jsonl"), list(files.values()))
        sources = tuple((version, str(Path(folder, version))) for version in versions)
        config = CurateConfig(sources=sources, stages=(DedupConfig(),))
        report = run(config, Path(folder, "out"))
    removed = {reason: found["documents"] for reason, found in report["stages"]["dedup"]["removed"].items()}
    record(part="stdlib_run", removed=removed, left=report["stages"]["write"]["groups"]["source"])


def write(file: Path, texts: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run(config: CurateConfig, out: Path) -> dict[str, Any]:
    curate(config, prepare(config, repr(config), out), Resources(), lambda out, facts: None)
    return json.loads((out / "report.json").read_bytes())


def speed(record: Any) -> None:
    """Processor seconds of each pass over pieces of the standard library of 3,000 characters."""
    text = "".join(modules(Path(sysconfig.get_path("stdlib"))).values())
    pieces = [text[start : start + 3000] for start in range(0, len(text) - 3000, 250)]
    random.Random(0).shuffle(pieces)
    pieces = pieces[:40_000]
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(4):
            write(Path(folder, "in", f"{shard}.jsonl"), pieces[shard::4])
        config = CurateConfig(sources=(("in", str(Path(folder, "in"))),), stages=(DedupConfig(),), shard_bytes=1)
        work = prepare(config, "", Path(folder, "out"))
        seconds = {}
        for one in passes(config, work, lambda out, facts: None):
            started = time.process_time()
            execute([one], work, Resources())
            seconds[one.name] = time.process_time() - started
    started = time.process_time()
    sets = [shingles(piece, 5) for piece in pieces]
    shingled = time.process_time() - started
    started = time.process_time()
    for start in range(0, len(sets), 256):
        signatures(sets[start : start + 256], DedupConfig())
    signed = time.process_time() - started
    parts = {"shingles": shingled, "signatures": signed, **{k: seconds[k] for k in ("gather", "match", "choose")}}
    record(
        part="speed", documents=len(pieces), words=float(np.mean([len(re.findall(r"\w+", p)) for p in pieces[:2000]])),
        seconds=seconds, deduplication=parts, per_second=len(pieces) / sum(parts.values()),
        whole_run_per_second=len(pieces) / sum(seconds.values()), peer_per_second=peer_speed(pieces[:2000]),
    )  # fmt: skip


def peer_speed(pieces: list[str]) -> float:
    """Documents per processor second through datatrove's own steps, with words by our regular expression."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupSignature,
    )
    from datatrove.utils.hashing import HashConfig

    from orogen.data.curate.rules import Words

    config = MinhashConfig(n_grams=5, num_buckets=20, hashes_per_bucket=13, hash_config=HashConfig(hash_fc="sha1"))
    with tempfile.TemporaryDirectory() as folder:
        signature = MinhashDedupSignature(f"{folder}/signatures", config, language=Words())  # pyright: ignore
        documents: Any = (Document(text, str(number)) for number, text in enumerate(pieces))
        started = time.process_time()
        signature.run(documents)
        for rank in range(20):
            MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config).run(None, rank, 20)  # pyright: ignore
        MinhashDedupCluster(f"{folder}/buckets", f"{folder}/removed", config).run()
        return len(pieces) / (time.process_time() - started)


def corpus(folder: Path) -> dict[str, list[str]]:
    """A dirty corpus, what the classifier learns from, and two held-out sets, of which one is in the corpus too.

    Clean text is the standard library. Each of the 16 leaked passages of 256 characters stands in 12 places of the 64
    clean documents, which stay far below the limit of splits.
    """
    draw = random.Random(0)
    found = modules(Path(sysconfig.get_path("stdlib")))
    texts = [found[name] for name in sorted(found, key=lambda n: sha256(n.encode()).digest())]
    texts = [text for text in texts if text.isascii() and 3000 < len(text) < 40_000]
    passages = [text[i : i + 256] for text in texts[:32] for i in range(500, 2500, 500)]
    leaked, clean = passages[::2][:16], passages[1::2][:64]
    learned, copied, pool = texts[32:62], texts[62:66], texts[66:130]
    contaminated = list(pool)
    for passage in leaked * 12:
        at = draw.randrange(len(contaminated))
        text = contaminated[at]
        place = text.find("\n", draw.randrange(len(text))) + 1
        contaminated[at] = text[:place] + passage + "\n" + text[place:]
    size = sum(map(len, contaminated))
    copies, junk = [], []
    while sum(map(len, copies)) < 2.6 * size:
        words = re.split(r"(\W+)", copied[len(copies) % 4])
        for at in draw.sample(range(0, len(words), 2), 8):
            words[at] = f"x{draw.randrange(10**6)}"
        copies.append("".join(words))
    while sum(map(len, junk)) < 1.3 * size:
        junk.append(noise(draw))
    raw = contaminated + copies + junk
    draw.shuffle(raw)
    write(folder / "raw" / "raw.jsonl", raw)
    write(folder / "good.jsonl", learned)
    write(folder / "bad.jsonl", [noise(draw) for _ in range(60)])
    write(folder / "leaked.jsonl", leaked)
    write(folder / "clean.jsonl", clean)
    return {"leaked": leaked, "clean": clean}


def noise(draw: random.Random) -> str:
    """Encoded bytes between tables of numbers and a few words, 2 to 8 kB."""
    lines = []
    for _ in range(draw.randrange(30, 110)):
        code = base64.b64encode(draw.randbytes(48)).decode()
        table = " ".join(f"{draw.gauss(0, 9):.3f}" for _ in range(9))
        lines.append(draw.choice([code, table, f"item {draw.randrange(10**6)} click here {draw.randrange(99)}"]))
    return "\n".join(lines)


def loss(record: Any, seeds: list[int], arms: list[str]) -> None:
    """Curates the corpus and trains on each result. The corpora are the same for every seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        heldout = corpus(folder)
        corpora = {"raw": folder / "raw"}
        classify = ClassifyConfig(good=(str(folder / "good.jsonl"),), bad=(str(folder / "bad.jsonl"),))
        tests = tuple(str(folder / f"{kind}.jsonl") for kind in heldout)
        stages = {
            "dedup": (DedupConfig(),), "filter": (classify,), "dedup+filter": (classify, DedupConfig()),
            "all": (classify, DedupConfig(), DecontaminateConfig(evaluation=tests)),
        }  # fmt: skip
        for arm, chosen in stages.items():
            config = CurateConfig(sources=(("raw", str(folder / "raw")),), stages=chosen)
            report = run(config, folder / arm)
            corpora[arm] = folder / arm / "documents"
            record(
                part="corpus", arm=arm, read=report["stages"]["read"]["left"], left=report["stages"]["write"]["left"]
            )
        for seed in seeds:
            for arm in arms:
                out = folder / f"{arm}-{seed}"
                train(corpora[arm], seed, out)
                losses = {kind: evaluate(out, texts) for kind, texts in heldout.items()}
                record(part="loss", arm=arm, seed=seed, **losses)


def train(path: Path, seed: int, out: Path) -> None:
    status = cli.main(
        ["train", "--gin_file", str(HERE / "model.gin"), "--run", str(out), "--gin_bindings",
         f"DataConfig.corpus = {str(path)!r}", "--gin_bindings", f"TrainConfig.seed = {seed}"]
    )  # fmt: skip
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert status == 0 and last["step"] == STEPS, "the training was stopped"


def evaluate(out: Path, texts: list[str]) -> float:
    """Nats per byte of the passages, after the first byte of each."""
    from orogen.checkpoint.open import open_model
    from orogen.config.plan import PlanConfig
    from orogen.infer.score import score

    opened = open_model(out, PlanConfig(), "float32")
    assert opened.tokenizer is not None
    tokens = np.array([opened.tokenizer.encode(text) for text in texts], np.int32)
    return -float(score(opened, tokens)["logprobs"].mean())


def draw() -> None:
    """The figure, from results.jsonl alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    x = np.linspace(0.4, 1, 200)
    left.plot(x, candidate_probability(x, DedupConfig()), label="1 − (1 − J¹³)²⁰")
    points = [row for row in rows if row["part"] == "curve"]
    left.plot([p["jaccard"] for p in points], [p["measured"] for p in points], "o", label="planted, three seeds")
    left.set(xlabel="Jaccard index", ylabel="share of pairs that become candidates")
    left.legend()
    losses = [row for row in rows if row["part"] == "loss"]
    for offset, kind in ((-0.1, "clean"), (0.1, "leaked")):
        values = [[row[kind] for row in losses if row["arm"] == arm] for arm in ARMS]
        at = np.arange(len(ARMS)) + offset
        (line,) = right.plot(at, [np.mean(v) for v in values], "o", label=f"{kind} held-out text")
        for place, several in zip(at, values, strict=True):
            right.plot([place] * len(several), several, "_", color=line.get_color(), markersize=12)
    right.set_xticks(range(len(ARMS)), ARMS)
    right.set_ylabel("nats per byte after 327,680 bytes")
    right.grid(axis="y", alpha=0.3)
    right.legend()
    figure.savefig(HERE / "figure.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("curve", "stdlib", "speed", "loss", "draw"))
    parser.add_argument("--old", type=Path, help="the library's folder of the older version")
    parser.add_argument("--new", type=Path, help="the library's folder of the newer version")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of the training runs")
    parser.add_argument("--arms", default=",".join(ARMS), help="the corpora that are trained on")
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()

    def record(**facts: Any) -> None:
        print(facts, flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(facts) + "\n")

    if options.part == "draw":
        draw()
    elif options.part == "stdlib":
        stdlib(options.old, options.new, record)
    elif options.part == "loss":
        loss(record, [int(seed) for seed in options.seeds.split(",")], options.arms.split(","))
    else:
        {"curve": curve, "speed": speed}[options.part](record)


if __name__ == "__main__":
    main()
