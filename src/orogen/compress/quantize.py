"""Post-training quantisation: calibrate, choose formats, write the folder, and measure the loss before and after."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orogen.checkpoint.folders import HuggingFaceFolder
from orogen.checkpoint.open import open_folder, read_model
from orogen.checkpoint.transfer import export
from orogen.compress.allocate import Allocation, Unit, allocate, require_budget, summary
from orogen.compress.cache_scales import cache_scales, require_keys_and_values
from orogen.compress.calibration_text import CalibrationText
from orogen.compress.quantised_folder import Error, bits_of, entries_of, layout_of, write_entries
from orogen.compress.sensitivity import Passes
from orogen.compress.units import by_unit, kinds_with, sizes_of, weights_of
from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig
from orogen.config.quantize import AUTO, PLAIN, ROUTED, UNITS, QuantizeConfig
from orogen.config.recipe import Scales
from orogen.data.tokenizer import Tokenizer

Key = tuple[int, str]  # layer and unit


class Calibrated(NamedTuple):
    """What calibration found, with the loss of the model before it is quantised (nats per token). maxima: None if no
    scale is static; scores: of `auto` alone, by unit and format; cache: scales of keys and values, by layer, none if
    these stay."""

    loss: float
    maxima: np.ndarray | None
    scores: dict[Key, dict[str, float]]
    cache: tuple[Scales | None, ...] = ()


class Outcome(NamedTuple):
    """A written folder: its config, the choice, the error of each unit's weights, stored bits per weight, and the loss
    after, with inputs, keys and values rounded as the formats say and with weights alone rounded."""

    config: QuantizeConfig
    allocation: Allocation
    units: list[Unit]
    errors: dict[Key, Error]
    stored_bits: float
    loss: float
    loss_weights: float


@contextlib.contextmanager
def unquantised_folder(source: Path, beside: Path) -> Iterator[HuggingFaceFolder]:
    """The checkpoint as a Hugging Face folder: itself, or exported for as long as the body runs, a run's float32
    masters in bfloat16. Raises ConfigError for a model that no family of Hugging Face holds."""
    with open_folder(source) as opened:
        if isinstance(opened, HuggingFaceFolder):
            yield opened
            return
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.parent) as scratch:
        export(source, Path(scratch) / "unquantised")
        with HuggingFaceFolder(Path(scratch) / "unquantised") as folder:
            yield folder


class Quantiser:
    """Quantises one checkpoint, once or under several configs that calibrate alike.

    plan: None: one device. text: from the tokenizer to what the model is calibrated and measured on. progress: called
    with a line per stage of the work.
    """

    def __init__(
        self, folder: HuggingFaceFolder, config: QuantizeConfig, text: Callable[[Tokenizer], CalibrationText], *,
        plan: PlanConfig | None = None, dtype: str = "float32", progress: Callable[[str], None] = lambda line: None,
    ):  # fmt: skip
        self.folder, self.config, self.dtype, self.progress = folder, config, dtype, progress
        self.plan = None if plan is None else plan.evaluating()
        self.choices = config.choices(folder.config)  # before the model is read
        self._require_layout()
        self.weights = weights_of(folder.tensors.table, folder.config)
        self.sizes = sizes_of(folder.tensors.table, self.weights)
        if config.format == AUTO:  # before the model is read and calibrated
            require_budget(self.units(Calibrated(0.0, None, {}), config), config.effective_bits)
        if config.key_values == "fp8":
            require_keys_and_values(folder.config, self.plan or PlanConfig())
        opened = read_model(folder, self.plan, dtype)
        if opened.tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer.json; expected one, to read calibration text with")
        self.passes = Passes(opened, dtype=dtype)
        rounds = config.inputs == "static"
        self.passes.require_whole_blocks(
            [
                {kind: [config.target(n) for n in names if n != PLAIN and (rounds or len(names) > 1)]
                 for kind, names in layer.items()}
                for layer in self.choices
            ]
        )  # fmt: skip
        self.text = text(opened.tokenizer)

    def _require_layout(self) -> None:
        """Raises ConfigError if the folder is quantised, or files cannot describe its weights as quantised."""
        first = ({k: next((n for n in names if n != PLAIN), PLAIN) for k, names in one.items()} for one in self.choices)
        targets = [{kind: self.config.target(name) for kind, name in layer.items()} for layer in first]
        layout_of(self.folder, entries_of(self.folder, targets))

    @property
    def _scored(self) -> int:
        """The number of batches on which sensitivities are measured."""
        return -(-self.config.score_tokens // self._batch)

    @property
    def _batch(self) -> int:
        """Tokens of a batch."""
        return self.config.batch_size * self.config.sequence_length

    def calibrate(self) -> Calibrated:
        """The loss before, the maxima of inputs and, with `auto`, the sensitivities."""
        config, choices = self.config, self.choices
        may = [{kind: set(names) - {PLAIN} for kind, names in layer.items()} for layer in choices]
        self.progress(f"loss before, on {self.text.tokens[1]} tokens")
        loss, maxima = self.passes.loss(self.text.heldout), None
        if config.inputs == "static" and any(names for layer in may for names in layer.values()):
            self.progress(f"largest magnitudes of inputs, on {self.text.tokens[0]} tokens")
            kinds = [[kind for kind, names in layer.items() if names] for layer in may]
            maxima = self.passes.maxima(self.text.calibration, kinds)
        cache = ()
        if config.key_values == "fp8":
            self.progress(f"largest keys and values, on {self.text.tokens[0]} tokens")
            cache = cache_scales(self.passes.opened, self.text.calibration, self.dtype)
        scores: dict[Key, dict[str, float]] = {}
        if config.format == AUTO:
            self.progress(f"sensitivities, on {self._scored * self._batch} tokens")
            scores = self._scores(self.text.calibration[: self._scored], maxima)
        return Calibrated(loss, maxima, scores, cache)

    def _scores(self, batches: Sequence[Any], maxima: np.ndarray | None) -> dict[Key, dict[str, float]]:
        """By unit, of each format that it may have; only units that have a choice are measured."""
        targets, named = [], {}
        for layer, kinds in enumerate(self.choices):
            measured = {}
            for kind, names in kinds.items():
                rounding = [name for name in names if name != PLAIN]
                if len(names) > 1:
                    measured[kind] = tuple(self.config.target(name) for name in rounding)
                    named[layer, kind] = rounding
            targets.append(measured)
        found = self.passes.scores(batches, targets, maxima if maxima is not None else np.zeros((1, 1, 1)))
        scores = {}
        for unit, kinds in UNITS.items():
            for layer, measured in enumerate(found):
                if kinds[0] in measured:
                    pairs = zip(named[layer, kinds[0]], measured[kinds[0]], strict=True)
                    scores[layer, unit] = {name: float(score) for name, score in pairs} | {PLAIN: 0.0}
        return scores

    def units(self, calibrated: Calibrated, config: QuantizeConfig) -> list[Unit]:
        """All units of the layers, with the formats that each may have."""
        model, found = self.folder.config, []
        share = 1.0
        if config.cost == "active" and model.n_routed_experts:
            share = (model.num_experts_per_tok or 1) / model.n_routed_experts
        for (layer, name), formats in by_unit(config.choices(model)).items():
            if (size := self.sizes.get((layer, name), 0)) == 0:
                continue
            known = calibrated.scores.get((layer, name), {})
            scores = {one: known.get(one, 0.0) for one in formats}
            found.append(Unit(layer, name, size, size * (share if name == ROUTED else 1.0), scores))
        return found

    def write(self, calibrated: Calibrated, target: Path, config: QuantizeConfig | None = None) -> Outcome:
        """Chooses formats, writes the Orogen folder `target`, opens it and measures its loss. The parameters of the
        model before are released, so that only one is in memory: there is no calibration after this. config: one that
        needs no more of calibration than the one that calibrated; None: that one."""
        config = config or self.config
        units, choices = self.units(calibrated, config), config.choices(self.folder.config)
        if config.format == AUTO:
            allocation = allocate(units, config.effective_bits)
            chosen = {(u.layer, u.name): f for u, f in zip(units, allocation.formats, strict=True)}
            formats = kinds_with(chosen, choices)
        else:
            formats = [{kind: names[0] for kind, names in layer.items()} for layer in choices]
            allocation = summary(units, [formats[unit.layer][UNITS[unit.name][0]] for unit in units])
        targets = [{kind: config.target(name) for kind, name in layer.items()} for layer in formats]
        entries = entries_of(self.folder, targets)
        if not entries:
            raise ConfigError("nothing would be quantised; expected fewer effective bits, or fewer kinds in keep")
        self.progress(f"{len(entries)} tensors")
        cache = calibrated.cache if config.key_values == "fp8" else ()
        errors = write_entries(self.folder, entries, target, maxima=calibrated.maxima, cache=cache)
        self.progress(f"loss after, on {self.text.tokens[1]} tokens")
        self.passes.release()
        with open_folder(target) as folder:
            params = read_model(folder, self.plan, self.dtype, tokenizer=False).params
        measured = functools.partial(self.passes.loss, self.text.heldout, params=params)
        alone = measured()
        quantised = [{k: t for k, t in layer.items() if t.format != PLAIN} for layer in targets]
        rounds = any(t.inputs for layer in quantised for t in layer.values())
        rounded = {"applied": quantised, "maxima": calibrated.maxima} if rounds else {}
        loss = measured(**rounded, cache=cache) if rounds or cache else alone
        return Outcome(config, allocation, units, errors, bits_of(errors, self.sizes), loss, alone)

    def described(self, calibrated: Calibrated, outcome: Outcome) -> dict[str, Any]:
        """The record of a quantisation, as JSON has it."""
        config = outcome.config
        errors = outcome.errors.values()
        before, after = (sum(getattr(e, name) for e in errors) for name in ("bytes_before", "bytes_after"))
        tokens = dict(zip(("calibration", "heldout"), self.text.tokens, strict=True))
        read = calibrated.maxima is not None or calibrated.cache
        tokens = tokens if read else {"heldout": tokens["heldout"]}
        tokens |= {"sensitivities": self._scored * self._batch} if config.format == AUTO else {}
        return {
            "format": config.format,
            "scales": config.scales,
            "inputs": config.inputs,
            "key_values": config.key_values,
            "tokens": tokens,
            "loss_before": calibrated.loss,
            "loss_after": outcome.loss,
            "loss_after_weights_alone": outcome.loss_weights,
            "relative_loss": outcome.loss / calibrated.loss - 1 if calibrated.loss else None,
            "effective_bits": outcome.allocation.effective_bits,
            "stored_bits": outcome.stored_bits,
            "quantised_bytes_before": before,
            "quantised_bytes_after": after,
            "layers": [
                self._row(unit, name, outcome.errors.get((unit.layer, unit.name)))
                for unit, name in zip(outcome.units, outcome.allocation.formats, strict=True)
            ],
        }

    def _row(self, unit: Unit, name: str, error: Error | None) -> dict[str, Any]:
        relative = None if error is None else (error.errors / max(error.squares, 1e-300)) ** 0.5
        scores = {one: score for one, score in unit.scores.items() if len(unit.scores) > 1}
        letter = self.folder.config.layers.main[unit.layer]
        return {
            "layer": unit.layer, "letter": letter, "unit": unit.name, "format": name, "weights": unit.size,
            "relative_error": relative, "scores": scores,
        }  # fmt: skip


def lines_of(record: Mapping[str, Any]) -> list[str]:
    """The record as a table for a terminal."""
    grid = [("layer", "weights of", "format", "numbers", "error", "sensitivity")]
    for row in record["layers"]:
        error = "" if row["relative_error"] is None else f"{row['relative_error']:.2%}"
        scores = "  ".join(f"{name} {score:.3g}" for name, score in row["scores"].items() if name != PLAIN)
        grid.append(
            (f"{row['layer']} {row['letter']}", row["unit"], row["format"], f"{row['weights']:,}", error, scores)
        )
    widths = [max(len(row[i]) for row in grid) for i in range(6)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in grid]
    change = "" if record["relative_loss"] is None else f", {record['relative_loss']:+.3%}"
    return [
        *lines,
        f"loss {record['loss_before']:.5f} before, {record['loss_after']:.5f} after{change} "
        f"({record['loss_after_weights_alone']:.5f} with weights alone), on {record['tokens']['heldout']:,} tokens",
        f"{record['effective_bits']:.3f} effective bits, {record['stored_bits']:.3f} stored bits per weight",
    ]
