"""How one operation is benchmarked: shapes by name or by sizes, correctness first, then all programs in turn."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orogen.bench.timing import Program, ceilings, summary, time_in_turn
from orogen.config.checks import ConfigError

Shape = dict[str, Any]
TOLERANCE = 1e-2  # of ‖result - reference‖ / ‖reference‖; the rounding of bfloat16 operands stays below it


class MissingError(Exception):
    """A peer's implementation is not installed, or cannot do this work: one line that says what is missing."""


class Work(NamedTuple):
    """FLOPs, and the fewest bytes of memory traffic: each input is read once, each output written once."""

    flops: float
    bytes: float


def _no_peer(shape: Shape, operands: Any, implementation: str) -> dict[str, Program]:
    raise MissingError("no peer for this operation")


class Operation(NamedTuple):
    """An operation to benchmark. A work is a named part of it, such as `forward`.

    shapes: named shapes, all with the same names of sizes. draw: operands of a shape, for a seed. works: analytic costs
    of each work; raises ConfigError on sizes that do not fit together. ours: the programs of one implementation, by
    work. check: the relative error of each result, given the results of one implementation, by work. peers: the names
    of the peer's implementations, none by default. peer: the programs of one of these, by work; raises MissingError.
    """

    name: str
    shapes: Mapping[str, Shape]
    implementations: Sequence[str]
    draw: Callable[[Shape, int], Any]
    works: Callable[[Shape], dict[str, Work]]
    ours: Callable[[Shape, Any, str], dict[str, Program]]
    check: Callable[[Shape, Any, dict[str, Any]], dict[str, float]]
    peers: Sequence[str] = ()
    peer: Callable[[Shape, Any, str], dict[str, Program]] = _no_peer


def bench(
    operation: Operation,
    *,
    shapes: Sequence[str],
    implementations: Sequence[str],
    peer: str | None,
    samples: int,
    seed: int,
    profile: Path | None = None,
    ceiling_sizes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The measured ceilings, and one record per shape, implementation and work: errors, times, achieved TFLOP/s, memory
    traffic, and the time that this traffic takes at the rate of the copy (memory_floor_ms).

    shapes: names, or sizes such as `b=2,t=8192` that replace those of the first named shape; empty: all named shapes.
    An implementation with an error above TOLERANCE is recorded as incorrect and not timed. Raises ConfigError on names
    that are unknown, on sizes or a device that an implementation refuses, and on a peer that is not installed.
    """
    unknown = [name for name in implementations if name not in operation.implementations]
    if unknown:
        expected = ", ".join(sorted(operation.implementations))
        raise ConfigError(f"implementation {unknown[0]!r}; expected some of {expected}")
    if peer is not None and not operation.peers:
        raise ConfigError(f"--peer {peer} with {operation.name}; expected none, since it has no peer")
    if peer is not None and importlib.util.find_spec("torch") is None:
        raise ConfigError(f"--peer {peer}: torch not installed; expected the extra `peer` (orogen[peer])")
    chosen = {text: read_shape(operation, text) for text in shapes or operation.shapes}
    for shape in chosen.values():
        operation.works(shape)  # sizes that do not fit together are refused before any is timed
    records = []
    with jax.profiler.trace(str(profile)) if profile else contextlib.nullcontext():
        for name, shape in chosen.items():
            facts = {"bench": operation.name, "shape": name, **shape, "dtype": "bfloat16"}
            records += [
                {**facts, **r}
                for r in _bench_shape(operation, shape, implementations, peer, samples=samples, seed=seed)
            ]
    measured = ceilings(samples=samples, sizes=ceiling_sizes)
    for record in records:
        if "megabytes" in record:
            record["memory_floor_ms"] = _digits(record["megabytes"] / measured["copy_tb_per_second"] / 1e3)
    return {
        "bench": operation.name, "device": f"one {jax.devices()[0].device_kind}", "jax": jax.__version__, "seed": seed,
        "samples": samples, "ceilings": measured, "records": records,
    }  # fmt: skip


def read_shape(operation: Operation, text: str) -> Shape:
    """The sizes of a named shape, or of one given as `name=value,…`. Raises ConfigError."""
    if text in operation.shapes:
        return dict(operation.shapes[text])
    shape = dict(next(iter(operation.shapes.values())))
    expected = f"one of {', '.join(operation.shapes)}, or sizes {', '.join(shape)} as in {next(iter(shape))}=1"
    for part in text.split(","):
        key, _, value = part.partition("=")
        number = value.isdecimal() and (int(value) > 0 or shape.get(key) == 0)
        if key not in shape or not (number or (isinstance(shape[key], str) and value)):
            raise ConfigError(f"--shape {text!r}; expected {expected}")
        shape[key] = type(shape[key])(value)
    return shape


def _bench_shape(
    operation: Operation, shape: Shape, implementations: Sequence[str], peer: str | None, *, samples: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Records of one shape: our implementations and the peer's, on the same operands."""
    operands, works = operation.draw(shape, seed), operation.works(shape)
    programs: dict[tuple[str, str], Program] = {}
    errors: dict[str, dict[str, float]] = {}
    sources = [(name, name, operation.ours) for name in implementations]
    sources += [(f"{peer} {name}", name, operation.peer) for name in operation.peers if peer is not None]
    for label, name, make in sources:
        try:
            made = make(shape, operands, name)
        except MissingError as error:
            yield {"implementation": label, "missing": " ".join(str(error).split())}
            continue
        except ConfigError:
            raise
        except ValueError as error:  # a kernel refuses the sizes, or the device
            raise ConfigError(f"{label} at {_sizes(shape)}: {error}") from error
        results = {work: program.read(program.start()) for work, program in made.items()}
        errors[label] = {key: _digits(e) for key, e in operation.check(shape, operands, results).items()}
        if all(error <= TOLERANCE for error in errors[label].values()):  # False for NaN
            programs |= {(label, work): program for work, program in made.items()}
        else:
            yield {"implementation": label, "correct": False, "errors": errors[label]}
    for (label, name), taken in time_in_turn(programs, samples=samples).items():
        times, work = summary(taken), works[name]
        yield {
            "implementation": label, "correct": True, "errors": errors[label], "work": name, **times,
            "tflops": _digits(work.flops / times["ms"] / 1e9),
            "megabytes": _digits(work.bytes / 1e6), "tb_per_second": _digits(work.bytes / times["ms"] / 1e9),
            "flops_per_byte": _digits(work.flops / work.bytes), "temporary_mb": programs[label, name].temporary_mb,
        }  # fmt: skip


def _sizes(shape: Shape) -> str:
    return ",".join(f"{key}={value}" for key, value in shape.items())


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def relative_error(result: Any, reference: Any) -> float:
    """‖result - reference‖ / ‖reference‖ in float64; infinite if the reference is all zero and the result is not."""
    result, reference = (np.asarray(a).astype(np.float64) for a in (result, reference))
    difference, size = np.linalg.norm(result - reference), np.linalg.norm(reference)
    if size == 0:
        return float("inf") if difference else 0.0
    return float(difference / size)


def largest_errors(names: Sequence[str], parts: Iterable[tuple[Sequence[Any], Sequence[Any]]]) -> dict[str, float]:
    """The largest relative error of each named result over all parts; NaN if one part's error is.

    parts: per part, the results and the references, in the order of the names.
    """
    errors = [[relative_error(a, b) for a, b in zip(mine, exact, strict=True)] for mine, exact in parts]
    return dict(zip(names, np.max(errors, axis=0).tolist(), strict=True))


def not_finite(results: Any) -> float:
    """The number of elements of all results that are not finite."""
    return float(sum(jnp.sum(~jnp.isfinite(result)) for result in jax.tree.leaves(results)))
