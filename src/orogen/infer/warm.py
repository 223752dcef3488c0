"""Compiles every program that an engine can need, so that none is compiled while requests wait."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax

from orogen.config.streams import say
from orogen.infer.arrays import Arrays
from orogen.infer.buckets import Buckets, Call
from orogen.infer.forward import Caches
from orogen.infer.packing import pack
from orogen.infer.programs import Held, Programs
from orogen.infer.samplers import Samplers

WORKERS = 8  # that compile at a time: each holds a program's whole text, and XLA has threads of its own


def compiling(
    programs: Programs, buckets: Buckets, arrays: Arrays, samplers: Samplers, stores: tuple[Held, Caches]
) -> list[Callable[[], Any]]:
    """One function per program of an engine, which compiles it; they may run at the same time. stores: what slots and
    snapshots hold."""
    held, snapshots = stores
    jobs = [*_reads(programs, buckets, arrays, samplers, held)]
    jobs += _decodes(programs, buckets, arrays, samplers, held)
    into, none = arrays.slot_row(0), arrays.snapshot_row(0, None)
    for one, other in ((held.caches, snapshots), (snapshots, held.caches)):
        jobs.append((programs.copy, (one, other, into, none)))
    if programs.keeps_text:
        jobs.append((programs.write, (held.caches, arrays.text((), programs.text_length), into)))
    return [lambda run=run, inputs=inputs: run.lower(*inputs).compile() for run, inputs in jobs]


def run_all(jobs: list[Callable[[], Any]]) -> None:
    """Runs them in threads; XLA compiles without Python's lock. Raises what one of them raises, or Ctrl-C, without
    waiting for the others: those that have not begun never do."""
    pool = ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1), "warm")
    try:
        for done in as_completed([pool.submit(job) for job in jobs]):
            done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def warm_aloud(engine: Any) -> None:
    """Compiles an engine's programs if its config asks for that, and says so: it takes minutes the first time.

    By default not on a CPU: there a request waits some seconds for a program that it is the first to need, and most
    servers need few of them.
    """
    asked = engine.config.warm
    if not (jax.default_backend() != "cpu" if asked is None else asked):
        return
    say("orogen: compiling every program; EngineConfig.warm = False leaves each to its first request")
    began = time.perf_counter()
    count = engine.warm()
    say(f"orogen: compiled {count} programs in {time.perf_counter() - began:.0f} s")


def _reads(
    programs: Programs, buckets: Buckets, arrays: Arrays, samplers: Samplers, held: Held
) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    for count, length, reach in buckets.reads():
        rows = arrays.rows(Call((), length, count))
        entries, counted, mask_rw = samplers.reading([None] * len(rows))
        inputs = pack(entries), *arrays.pieces(rows, length, {}, reach), counted, mask_rw
        yield programs.reader, programs.read_inputs(held, inputs)
    if not programs.config.exact:
        for count, length in dict.fromkeys((count, length) for count, length, _ in buckets.reads()):
            yield programs.scorer, programs.score_inputs(len(arrays.rows(Call((), length, count))), length)


def _decodes(
    programs: Programs, buckets: Buckets, arrays: Arrays, samplers: Samplers, held: Held
) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    for features in samplers.kinds:
        packed_bw, mask_bw = samplers.idle(features)
        for reach in buckets.decode_reaches:
            inputs = packed_bw, arrays.table_of(reach), mask_bw
            yield programs.decoder(features), programs.decode_inputs(held, inputs, 1)
