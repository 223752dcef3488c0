"""Captions of symbols by a small hybrid with and without retrieval, of symbols that it has never seen too.

PYTHONPATH=src python experiments/revilm/run.py --out runs/revilm            # three seeds
PYTHONPATH=src python experiments/revilm/run.py --out runs/revilm --quick    # one, short: do the commands work?
PYTHONPATH=src python experiments/revilm/run.py --table                      # of results.jsonl

It needs the wheels of the extra `pictures`: pip install 'orogen[vision,pictures]'.
"""

import argparse
import ast
import contextlib
import io
import json
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from pictures import BOLD, COLOUR, THIN, symbols, texts, views, write

from orogen import cli

HERE = Path(__file__).parent
SEEDS = (10, 11, 12)  # 0 was that of the first design
T_95 = 4.303  # Student's t for two degrees of freedom
STATES = ("before", "after", "0 shots", "2 shots", "4 shots")
ENCODER = "efficientnet_lite0/96"
LARGE = {
    f"ModelConfig.{field}": value
    for field, value in {"hidden_size": 148, "intermediate_size": 296, "num_attention_heads": 8,
                         "num_key_value_heads": 8, "mamba_num_heads": 18}.items()
}  # fmt: skip
# Layers that see images, inserted into the language model; the arms train these alone.
SIGHT = {"ModelConfig.pattern": "M*-xgM*-xg", "ModelConfig.image_features": 9, "ModelConfig.image_feature_size": 1280,
         "ModelConfig.resampler_latents": 4, "ModelConfig.resampler_layers": 1}  # fmt: skip
TRAINED = ("x", "g", "resampler")
WITH = {"VisionConfig.retrieved": 2}
CHUNKS = {"ModelConfig.retrieved_captions": 2, "ModelConfig.caption_tokens": 24}


class Arm(NamedTuple):
    """What an arm differs in; tokens and images of a row."""

    differs: dict[str, Any]
    length: int
    images: int = 1


ARMS = {
    "retrieval": Arm(WITH, 80),
    "none": Arm({}, 32),
    "large": Arm(LARGE, 32),
    "no_guard": Arm(WITH | {"VisionConfig.guard": None}, 80),
    "encoded": Arm(WITH | {"VisionConfig.retrieval": "encoded"} | CHUNKS, 32),
    "shots": Arm({"VisionConfig.shots": 2}, 84, 3),
}


class Size(NamedTuple):
    """Symbols trained on, symbols held out, views of each to learn from, documents of text, and steps on them and on
    pictures."""

    seen: int
    heldout: int
    views: int
    documents: int
    text_steps: int
    steps: int


WHOLE, QUICK = Size(240, 60, 6, 20_000, 500, 500), Size(12, 4, 4, 400, 8, 8)


def orogen(*words: object) -> dict[str, Any]:
    """What a task answers with --json. Raises SystemExit if it fails."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = cli.main([*map(str, words), "--json"])
    if status:
        raise SystemExit(status)
    return json.loads(out.getvalue())


def bound(values: dict[str, Any]) -> list[str]:
    """Bindings as arguments."""
    return [word for name, value in values.items() for word in ("--gin_bindings", f"{name} = {value!r}")]


def right(captions: list[dict[str, Any]], pairs: Path) -> dict[str, dict[str, float]]:
    """Of each kind of picture, the shares of captions with the right name, with the right colour, and right in all."""
    kinds: dict[str, list[tuple[bool, bool, bool]]] = {}
    for one, line in zip(captions, pairs.read_text().splitlines(), strict=True):
        (name, _, colour), (known, _, ground) = (one[key].rpartition(" on ") for key in ("caption", "reference"))
        kind = json.loads(line)["image"].partition("-")[0]
        kinds.setdefault(kind, []).append((name == known, colour == ground, one["caption"] == one["reference"]))
    names = ("name", "colour", "caption")
    return {
        kind: {name: sum(column) / len(found) for name, column in zip(names, zip(*found, strict=True), strict=True)}
        for kind, found in kinds.items()
    }


class Trial:
    """One seed: its choice of symbols, their pictures, databases and runs, in a folder."""

    def __init__(self, folder: Path, seed: int, size: Size, tried: dict[str, Any]):
        self.folder, self.seed, self.size, self.tried = folder / f"seed{seed}", seed, size, tried
        chosen = symbols()
        random.Random(seed).shuffle(chosen)
        seen, heldout = chosen[: size.seen], chosen[size.seen : size.seen + size.heldout]
        plain, some = (COLOUR, THIN), seen[: size.seen // 2]
        write(views(seen, plain, size.views, "train"), self.folder / "train")
        write(views(heldout, plain, size.views, "added"), self.folder / "added")
        lines = [json.dumps({"text": text}) for text in texts(heldout, size.documents, seed)]
        (self.folder / "text.jsonl").write_text("\n".join(lines) + "\n")
        test = [*views(some, plain, 1, "seen"), *views(some, (BOLD,), 1, "style"), *views(heldout, plain, 2, "heldout")]
        write(iter(test), self.folder / "test")
        for name, parts in (("before", ("train",)), ("after", ("train", "added"))):
            for number, part in enumerate(parts):
                orogen("database", "add" if number else "build", self.folder / name, "--input",
                       self.folder / part / "pairs.jsonl", "--encoder", ENCODER)  # fmt: skip

    def run(self, name: str, binds: dict[str, Any], *words: object) -> None:
        """A training run of the folder."""
        steps = binds["TrainConfig.steps"]
        common = {"TrainConfig.seed": self.seed, "OptimizerConfig.warmup_steps": max(1, steps // 20)}
        files = "--gin_file", HERE / "model.gin", "--gin_file", HERE / "train.gin"
        orogen("train", *files, "--run", self.folder / name, *bound(common | binds), *words)

    def language_model(self, sizes: dict[str, Any]) -> Path:
        """The run of a language model of these sizes, made if it is not there."""
        folder = self.folder / ("text_large" if sizes else "text")
        if not folder.exists():
            binds = {"DataConfig.corpus": str(self.folder / "text.jsonl"), "TrainConfig.steps": self.size.text_steps,
                     "TrainConfig.sequence_length": 80}  # fmt: skip
            self.run(folder.name, sizes | binds)
        return folder

    def train(self, arm: str) -> dict[str, Any]:
        """Parameters and seconds of an arm's run."""
        differs, length, images = ARMS[arm]
        mine = differs | self.tried
        model = SIGHT | {name: value for name, value in mine.items() if name.startswith("ModelConfig")}
        began = time.process_time()
        text = self.language_model(LARGE if arm == "large" else {})
        grafted = self.folder / f"{arm}_grafted"
        orogen("graft", "--checkpoint", text, "--gin_file", HERE / "model.gin", *bound(model), "--out", grafted,
               "--seed", self.seed)  # fmt: skip
        binds = model | differs | {
            "TrainConfig.steps": self.size.steps, "TrainConfig.sequence_length": length,
            "OptimizerConfig.trained": TRAINED, "VisionConfig.encoder": ENCODER, "VisionConfig.images_per_row": images,
            "VisionConfig.features": str(self.folder / "features"),
            "DataConfig.corpus": str(self.folder / "train" / "pairs.jsonl"), **self.tried,
        }  # fmt: skip
        if "VisionConfig.retrieved" in differs:
            binds["VisionConfig.database"] = str(self.folder / "before")
        self.run(arm, binds, "--checkpoint", grafted)
        total = orogen("params", "--gin_file", self.folder / arm / "config.gin")["total"]
        return {"parameters": total, "core_seconds": round(time.process_time() - began)}

    def caption(self, arm: str, *words: object) -> dict[str, dict[str, float]]:
        """Shares of right captions of the test pictures."""
        pairs = self.folder / "test" / "pairs.jsonl"
        asked = "caption", "--checkpoint", self.folder / arm, "--input", pairs, "--tokens", 32
        return right(orogen(*asked, *words)["captions"], pairs)

    def results(self, arm: str) -> dict[str, Any]:
        """An arm's line."""
        found: dict[str, Any] = {"seed": self.seed, "arm": arm, "steps": self.size.steps, **self.train(arm)}
        if "VisionConfig.retrieved" in ARMS[arm].differs:
            found["before"] = self.caption(arm, "--database", self.folder / "before")
            page = "--page", self.folder / f"{arm}.html"
            found["after"] = self.caption(arm, "--database", self.folder / "after", *page)
            return found
        if arm != "shots":
            return found | {"after": self.caption(arm)}
        for part in ("train", "added"):
            shutil.copytree(self.folder / part, self.folder / "all" / part)
        for shots in (0, 2, 4):
            words = ("--examples", self.folder / "all", "--features", self.folder / "features") if shots else ()
            found[f"{shots} shots"] = self.caption(arm, "--shots", shots, *words)
        return found


def table(records: list[dict[str, Any]]) -> str:
    """Percent of right names and of wholly right captions by arm, state of the database and kind of picture: the mean
    of the seeds, and half of its 95 % interval if there are three."""
    shares: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for record in records:
        for state in STATES:
            for kind, found in record.get(state, {}).items():
                shares.setdefault((record["arm"], state, kind), []).append(found)
    lines = ["| arm | state | pictures | seeds | names, % | captions, % |", "|---|---|---|---|---|---|"]
    for key, found in shares.items():
        cells = [interval([100 * one[what] for one in found]) for what in ("name", "caption")]
        lines.append(f"| {' | '.join((*key, str(len(found)), *cells))} |")
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    """mean ± half of the 95 % interval by Student's t, which needs three values here."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {T_95 * statistics.stdev(values) / 3**0.5:.1f}" if len(values) == 3 else mean


def binding(text: str) -> tuple[str, Any]:
    """A name and its value, a Python literal."""
    name, _, value = text.partition("=")
    return name, ast.literal_eval(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/revilm"), help="a new folder")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps; nothing is recorded")
    parser.add_argument("--arms", default=",".join(ARMS), help="those to run, separated by commas")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="which seeds run")
    parser.add_argument("--steps", type=int, default=WHOLE.steps, help="on pictures")
    parser.add_argument("--bind", action="append", default=[], type=binding, metavar="X.y=1",
                        help="tried in the arms; nothing is recorded")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="only prints a table of results.jsonl")
    options = parser.parse_args()
    recorded = HERE / "results.jsonl"
    if options.table:
        print(table([json.loads(line) for line in recorded.read_text().splitlines()]))
        return
    unrecorded = options.quick or options.bind
    for seed in SEEDS[:1] if options.quick else options.seeds:
        size = QUICK if options.quick else WHOLE._replace(steps=options.steps)
        trial = Trial(options.out, seed, size, dict(options.bind))
        for arm in options.arms.split(","):
            line = json.dumps(trial.results(arm))
            print(line, flush=True)
            if not unrecorded:
                with recorded.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
