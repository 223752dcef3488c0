"""Times a query of one image in a database of 200,000 entries, on one core, for each kind of index.

PYTHONPATH=src python experiments/revilm/search.py --out runs/revilm_search

Embeddings are clusters on a sphere: 20,000 centres, ten entries near each (cosine about 0.8 to its centre, as views of
one picture have); a query is an eleventh. Recall: the share of the exact ten neighbours that are found.
"""

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from orogen.vision import database
from orogen.vision.database import Database, Entry
from orogen.vision.index import KINDS

HERE = Path(__file__).parent
CENTRES, NEAR, QUERIES, SPREAD = 20_000, 10, 200, 0.75


def embeddings(dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Entries (n, e) and queries (b, e)."""
    rng = np.random.default_rng(0)
    centre_me = database.unit(rng.normal(size=(CENTRES, dimension)).astype(np.float32))

    def near(number_n: np.ndarray) -> np.ndarray:
        noise_ne = rng.normal(size=(len(number_n), dimension)).astype(np.float32)
        return database.unit(centre_me[number_n] + SPREAD / dimension**0.5 * noise_ne)

    return near(np.repeat(np.arange(CENTRES), NEAR)), near(rng.choice(CENTRES, QUERIES, replace=False))


def measure(kind: str, folder: Path, dimension: int) -> dict[str, Any]:
    """Milliseconds of CPU time of a query, alone and in a batch, and recall, of one kind of index."""
    import faiss

    faiss.omp_set_num_threads(1)
    entry_ne, query_be = embeddings(dimension)
    encoder: Any = SimpleNamespace(name="random", fingerprint="0" * 64, dimension=dimension)
    entries = [Entry(f"caption {number}", str(number)) for number in range(len(entry_ne))]
    began = time.process_time()
    database.create(folder / kind, encoder, entry_ne, entries, index=kind)
    built = time.process_time() - began
    opened = Database(folder / kind)
    opened.search(query_be[:8], 10)  # reads the files once
    alone = []
    for query_e in query_be:
        began = time.process_time()
        opened.search(query_e[None], 10)
        alone.append(1e3 * (time.process_time() - began))
    began = time.process_time()
    found = opened.search(query_be, 10)
    together = 1e3 * (time.process_time() - began) / len(query_be)
    exact = np.argsort(-(query_be @ entry_ne.T), axis=1)[:, :10]
    pairs = zip(found, exact, strict=True)
    recall = np.mean([len({hit.id for hit in hits} & set(known.tolist())) / 10 for hits, known in pairs])
    return {
        "index": kind, "entries": len(entry_ne), "dimension": dimension, "build_s": round(built, 1),
        "query_ms": round(float(np.median(alone)), 3), "query_ms_p95": round(float(np.quantile(alone, 0.95)), 3),
        "batched_ms": round(together, 3), "recall_at_10": round(float(recall), 4),
        "megabytes": round(sum(file.stat().st_size for file in (folder / kind).rglob("*")) / 1e6),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/revilm_search"), help="a new folder")
    parser.add_argument("--dimension", type=int, default=512, help="of the embeddings; CLIP's are 512 to 768")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of indices, separated by commas")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    for kind in options.kinds.split(","):
        line = json.dumps(measure(kind, options.out, options.dimension))
        print(line, flush=True)
        with (HERE / "search.jsonl").open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
