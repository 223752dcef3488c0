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
    """Floating-point operations and the fewest bytes through memory, each input read and each output written once."""

    flops: float
    bytes: float


def _no_peer(shape: Shape, operands: Any, implementation: str) -> dict[str, Program]:
    raise MissingError("no peer for this operation")


class Operation(NamedTuple):
    """An operation to benchmark. A work is a named part of it, such as `forward`.

    shapes: sizes by name; every shape has the size names of the first. draw: operands of a shape, by seed.
    works: analytic costs of each work; raises ConfigError on sizes that do not fit together. ours: programs by work, of
    an implementation. check: the relative error of every result, given the results of one implementation's works.
    peers: the names of the peer's implementations, none by default. peer: programs by work, of one of these; raises
    MissingError.
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
    """One record per shape, implementation and work, with errors, times, achieved TFLOP/s, bytes through memory and
    the time that these take at the ceiling's rate (memory_floor_ms), beside the ceilings.

    shapes: names, or sizes as `b=2,t=8192`, the others as in the first named shape; none: every named one. A
    result that is wrong beyond TOLERANCE is recorded as such and not timed. Raises ConfigError on unknown names, on
    sizes or a device that an implementation refuses, and on a peer that is not installed.
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
    """The sizes of a shape that is named, or given as `name=value,…`. Raises ConfigError."""
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
    """Records of one shape: ours, and the peer's implementations, on the same operands."""
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
        if all(error <= TOLERANCE for error in errors[label].values()):  # which NaN is not
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
    """The largest relative error of each named result over the parts in which it is compared; NaN if one is.

    parts: for each part the results and the references, in the order of the names.
    """
    errors = [[relative_error(a, b) for a, b in zip(mine, exact, strict=True)] for mine, exact in parts]
    return dict(zip(names, np.max(errors, axis=0).tolist(), strict=True))


def not_finite(results: Any) -> float:
    """How many numbers in all results are not finite."""
    return float(sum(jnp.sum(~jnp.isfinite(result)) for result in jax.tree.leaves(results)))
