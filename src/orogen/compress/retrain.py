"""Prunes and briefly distils the best candidates of a search, ranks them by their loss on held-out text, and distils
the best one further. No jax: `orogen prune` and `orogen distill` do the work.

Minitron calls this lightweight retraining; it changes the ranking (arXiv:2407.14679, section 3; Nemotron-H's 47B was
the best of three after 7 B tokens, arXiv:2504.03624, section 4).
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orogen.compress.puzzle import read_scores, removal_order
from orogen.compress.search import Found
from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.json_file import Record, Whole, read_json
from orogen.config.model import ModelConfig
from orogen.config.search import SearchConfig
from orogen.report.metrics import read_metrics

OROGEN = (sys.executable, "-m", "orogen.cli")
PRUNING = "pruning.json"  # as `pruning.FILE`, which imports jax
REMOVAL = "removal.jsonl"  # as `pruning.REMOVAL`
CANDIDATES, RANKING, WINNER = "candidates.json", "ranking.jsonl", "winner"
HELDOUT, DIVERGENCE = "whole_heldout_loss", "whole_heldout_divergence"
# Of PruneConfig, how the scores were taken.
TAKEN = {"width_scores": str, "depth_scores": str, "expert_scores": str, "seed": Whole()}
# The words of a command -> its answer as JSON.
Call = Callable[[Sequence[str]], dict[str, Any]]


class Retraining(NamedTuple):
    """checkpoint: of the parent, which is also the teacher; scores: the folder of an earlier pruning of it; training,
    winner: gin files of `orogen distill` for each candidate, and for the best one (none: it is not distilled further);
    run: the folder of all results."""

    checkpoint: Path
    scores: Path
    training: Sequence[str]
    winner: Sequence[str]
    run: Path


def removal_of(search: SearchConfig, parent: ModelConfig, asked: Retraining | None) -> list[int]:
    """The parent's layers in the order in which candidates lack them: by the scores that the search names, or else by
    those of the pruning whose scores the candidates are pruned by."""
    file = search.removal
    if file is None and asked is not None and (asked.scores / REMOVAL).is_file():
        file = str(asked.scores / REMOVAL)
    return [] if file is None else removal_order(read_scores(Path(file), parent, "removal"))


def retrain(found: Sequence[Found], parent: ModelConfig, asked: Retraining, call: Call) -> list[dict[str, Any]]:
    """The candidates, the best first, with nats per token of held-out text after distillation. A second call
    with the same folder continues where the first stopped. Raises ConfigError if the folder has other candidates."""
    _claim(asked, [one.facts() for one in found])
    ranked: list[dict[str, Any]] = []
    for place, one in enumerate(found, 1):
        folder = asked.run / f"candidate_{place}"
        if not (folder / "pruned").exists():
            told = call(_pruning(one, parent, asked, folder))
            if told["parameters"][1] != one.costs["parameters"]:
                expected = f"expected {one.costs['parameters']:,.0f}, as the search counts them"
                raise ConfigError(f"candidate {place} has {told['parameters'][1]:,} parameters when pruned; {expected}")
        call(_distilling(asked.checkpoint, folder / "pruned", folder / "distilled", asked.training))
        ranked.append({"place": place, **one.facts(), **_measured(folder / "distilled")})
        ranked.sort(key=lambda facts: facts["heldout_loss"])
        write_atomically(asked.run / RANKING, "".join(json.dumps(facts) + "\n" for facts in ranked).encode())
    if asked.winner:
        student = asked.run / f"candidate_{ranked[0]['place']}" / "distilled"
        call(_distilling(asked.checkpoint, student, asked.run / WINNER, asked.winner))
        ranked[0]["winner"] = _measured(asked.run / WINNER)
    return ranked


def call_orogen(words: Sequence[str]) -> dict[str, Any]:
    """Runs the command in a process of its own, so that its memory is free afterwards. Its stderr is shown. Raises
    ConfigError unless it exits with status 0."""
    done = subprocess.run([*OROGEN, *words, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"orogen {' '.join(words)} ended with status {done.returncode}; expected 0")
    return json.loads(done.stdout.splitlines()[-1])


def _claim(asked: Retraining, candidates: list[dict[str, Any]]) -> None:
    """Records the candidates in the folder, or checks that they are those recorded there."""
    wanted = {"checkpoint": str(asked.checkpoint), "candidates": candidates}
    file = asked.run / CANDIDATES
    if file.exists() and read_json(file) != json.loads(json.dumps(wanted)):
        raise ConfigError(f"{file} has other candidates than this search; expected a new --run, or the same search")
    asked.run.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(wanted).encode())


def _pruning(one: Found, parent: ModelConfig, asked: Retraining, folder: Path) -> list[str]:
    """The words of the command that prunes the parent to a candidate; a file in the folder has its sizes."""
    sizes: dict[str, Any] = {field: size for field, size in one.widths.items() if size != getattr(parent, field)}
    if one.removed:  # a pattern may fit several choices of layers, of which the pruning's scores would take another
        sizes["remove_layers"] = one.removed
    elif one.model.layers.main != parent.layers.main:
        sizes["pattern"] = one.model.layers.main
    if not sizes:
        raise ConfigError("the model itself is a candidate; expected budgets that it exceeds")
    taken = read_json(asked.scores / PRUNING, Record({"prune": Record(TAKEN)}))["prune"]
    settings = sizes | {name: taken[name] for name in TAKEN}
    lines = [f"PruneConfig.{name} = {value!r}\n" for name, value in settings.items()]
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "prune.gin", "".join(lines).encode())
    words = ["prune", "--checkpoint", str(asked.checkpoint), "--scores", str(asked.scores)]
    return [*words, "--gin_file", str(folder / "prune.gin"), "--out", str(folder / "pruned")]


def _distilling(teacher: Path, student: Path, run: Path, files: Sequence[str]) -> list[str]:
    words = ["distill", "--checkpoint", str(teacher), "--student", str(student), "--run", str(run), "--resume"]
    return words + [word for file in files for word in ("--gin_file", str(file))]


def _measured(run: Path) -> dict[str, float]:
    """The scores of the whole held-out split at the end of a run."""
    last = read_metrics(run)[-1]
    if HELDOUT not in last:
        expected = "expected DataConfig.heldout_fraction above 0, text to rank candidates on"
        raise ConfigError(f"{run} has no {HELDOUT} after its last step; {expected}")
    return {"heldout_loss": last[HELDOUT], "heldout_divergence": last[DIVERGENCE]}
