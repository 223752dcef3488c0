"""Malformed files for every reader, drawn from a seed: each must be read, or refused in one line with nothing written.

A few hundred run with the tests. All of them: python -m tests.fuzz [--count 10000] [--first 0] [READER …]
"""

import argparse
import collections
import gzip
import io
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import zstandard
from pyarrow import parquet
from tests.convert.synthetic import CASES, shapes, write

from orogen.checkpoint.transfer import from_hf
from orogen.cli import PATH_ERRORS
from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.data.sources import read_documents
from orogen.data.tokenizer import Tokenizer
from orogen.data.vocabulary import byte_tokenizer, train_bpe
from orogen.infer.score import read_array

TEXTS = [f"document {number}: a few words, é and 🙂\n" * (number % 3) for number in range(12)]
MOST_BYTES = 1 << 30  # of memory that reading may take beyond what the process has
MOST_SECONDS = 20
ADDRESS_BYTES = 16 << 30

# Values that a field of any type may be replaced by; as JSON text, since Python's own dumps cannot write them all.
ODD_JSON = (
    "null", "true", "false", "0", "1", "-1", "2", "1.5", "1e999", "-0.0", "NaN", "-Infinity", "1e308", str(2**31),
    str(2**63), str(2**64), str(10**40), "7" * 5000, '""', '"x"', '"\\u0000"', '"\\ud800"', '"../x"',
    '"/etc/passwd"', '"."',
    '"F32"', '"é"', "[]", "[0]", "[0, 0, 0]", "[null]", "[[]]", "{}", '{"a": 1}', '{"__float__": "x"}',
    '{"__float__": 1}',
    "[" * 70 + "]" * 70, "[" * 5000, '{"a":' * 200 + "1" + "}" * 200, "[" + "9," * 500 + "9]",
)  # fmt: skip
ODD_GIN = (
    "None", "True", "-1", "0", "1.5", "1e999", "-1e999", "10**9", str(2**63), str(10**40), "7" * 5000, "''", "'x'",
    "'\\x00'",
    "'\\ud800'", "b'x'", "()", "[1, 2]", "{'a': 1}", "{1, 2}", "@ModelConfig", "@ModelConfig()", "@os.system",
    "%A", "%B",
    "@a/ModelConfig()", "(" * 300 + ")" * 300, "[" * 5000, "-" * 5000 + "1", "'" + "x" * 10**5 + "'", "1 2",
    "lambda: 1",
    "__import__('os')", "open('x', 'w')", "'a' 'b'", "'''a\nb'''", "1j", "0x10", "{'a': {'b': [1, (2,)]}}", "...",
)  # fmt: skip
ODD_LINES = (
    "import os", "from os import path", "import orogen.cli as x", "from __gin__ import dynamic_registration",
    "include 'run.gin'", "include '/etc/passwd'", "include '../x'", "include 'part.gin'", "include ''", "include 3",
    "A = %A", "A = %B\nB = %A", "A = @ModelConfig()", "ModelConfig:",
    "ModelConfig:\n\thidden_size = 3\n  vocab_size = 3",
    "  ModelConfig.hidden_size = 3", "=", "@", "\x00", "\f", "\\", "é = 1", "ModelConfig.pattern = @A()", "a/b/c.d = 1",
    "macro.value = 1", "A/gin.macro.value = @A/macro()", "gin.singleton.constructor = @ModelConfig", "#" * 10**4,
    "gin.constant.x = 1", "ModelConfig.hidden_size = \\\n 3", "x" * 10**5, '"""', "\ufeff", "\u2028", "print(1)",
)  # fmt: skip

GIN = """ModelConfig.pattern = 'M*-E'
ModelConfig.vocab_size = 259
ModelConfig.hidden_size = SIZE
SIZE = 12
include 'part.gin'
ModelConfig:
    num_attention_heads = 6
    num_key_value_heads = 2
TrainConfig.steps = 2
TrainConfig.batch_size = 4
TrainConfig.sequence_length = 24
TrainConfig.seed = 0
TrainConfig.sample_prompts = ('', 'a')
OptimizerConfig.learning_rate = 1e-3
DataConfig.corpus = 'stdlib'
DataConfig.tokenizer = 'byte'
""".replace("SIZE\n", "%SIZE\n", 1)
PART = "".join(
    f"ModelConfig.{field} = {value}\n"
    for field, value in {
        "head_dim": 4, "intermediate_size": 14, "mamba_num_heads": 6, "mamba_head_dim": 4, "n_groups": 2,
        "ssm_state_size": 5, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 10,
    }.items()
)  # fmt: skip

# Mutations


def mutated_bytes(draw: random.Random, data: bytes) -> bytes:
    """`data` with one to four bytes or stretches changed, cut out, doubled or put in."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(found) + 1)
        if draw.random() < 0.5:  # most formats keep their structure at an end
            place = draw.choice((min(len(found), draw.randrange(64)), max(0, len(found) - draw.randrange(1, 600))))
        kind, size = draw.randrange(6), draw.choice((1, 1, 2, 4, 8, 40))
        if kind == 0 and place < len(found):
            found[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            found[place : place + size] = bytes([draw.choice((0, 255, 127, 128, 34, 91, 123, 92))]) * size
        elif kind == 2:
            del found[place : place + size]
        elif kind == 3:
            found[place:place] = draw.randbytes(size)
        elif kind == 4:
            found[place:place] = found[place : place + 4 * size]
        elif draw.random() < 0.3:
            del found[place:]
    return bytes(found)


def mutated_json(draw: random.Random, value: Any) -> bytes:
    """The JSON text of `value` with a node or two replaced, left out, doubled or wrapped; at times its bytes too."""
    marks: dict[str, str] = {}
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        parents = [node for node in _nodes(value) if node]
        if not parents:
            break
        parent = draw.choice(parents)
        key = draw.choice(list(parent)) if isinstance(parent, dict) else draw.randrange(len(parent))
        mark = f"@{len(marks)}@"
        kind = draw.randrange(7)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[draw.choice(("", "x", "é", "__metadata__", "type", f"{key}."))] = parent[key]
        elif kind == 1:
            parent.insert(key, parent[key])
        elif kind == 2:
            parent[key] = draw.choice(([parent[key]], {"x": parent[key]}, [parent[key]] * 3, str(parent[key])))
        else:
            parent[key], marks[f'"{mark}"'] = mark, draw.choice(ODD_JSON)
    text = json.dumps(value)
    for mark, odd in marks.items():
        text = text.replace(mark, odd)
    if draw.random() < 0.05:
        text = text.replace("{", '{"x": 1, "x": 2, ', 1)
    data = text.encode(draw.choice(("utf-16", "utf-8-sig", "utf-32")) if draw.random() < 0.02 else "utf-8")
    return mutated_bytes(draw, data) if draw.random() < 0.15 else data


def mutated_gin(draw: random.Random, text: str) -> bytes:
    """A gin file with a line or two whose value is another, or that are left out, doubled or odd."""
    lines = text.splitlines()
    for _ in range(draw.choice((1, 1, 2, 3))):
        place = draw.randrange(len(lines)) if lines else 0
        kind = draw.randrange(6)
        if kind == 0 or not lines:
            lines.insert(place, draw.choice(ODD_LINES))
        elif kind == 1:
            del lines[place]
        elif kind == 2:
            lines.insert(place, draw.choice(lines))
        elif "=" in lines[place]:
            lines[place] = f"{lines[place].split('=')[0]}= {draw.choice(ODD_GIN)}"
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return mutated_bytes(draw, data) if draw.random() < 0.3 else data


def _nodes(value: Any) -> list[Any]:
    """Every list and object in `value`, itself included."""
    found, left = [], [value]
    while left:
        node = left.pop()
        if isinstance(node, dict | list):
            found.append(node)
            left += node.values() if isinstance(node, dict) else node[:50]
    return found


# Readers: each writes a malformed file into a folder of its own, and gives what reads it

Read = Callable[[], object]


class Bases:
    """Whole files that the malformed ones are made of, in a folder."""

    def __init__(self, folder: Path):
        self.folders = {}
        for case in CASES:
            config, tensors = shapes(case, mtp=case == "nemotron_h")
            write(folder / case, config, tensors)
            self.folders[case] = folder / case
        trained = train_bpe(["some words and some more words, and numbers 123 456\n"] * 9, vocab_size=275)
        self.tokenizers = []
        for name, tokenizer in (("byte", byte_tokenizer()), ("bpe", trained)):
            tokenizer.save(folder / name)
            self.tokenizers.append(folder / name)
        lines = [json.dumps({"id": n, "text": text, "meta": {"a": [n, None]}}) for n, text in enumerate(TEXTS)]
        self.lines = ("\n".join(lines) + "\n").encode()


def _hub(bases: Bases, draw: random.Random, folder: Path, case: str = "") -> Read:
    shutil.copytree(bases.folders[case or draw.choice(CASES)], folder / "hf", dirs_exist_ok=True)

    def convert() -> None:
        from_hf(folder / "hf", folder / "ours")
        shutil.rmtree(folder / "ours")

    return convert


def index(bases: Bases, draw: random.Random, folder: Path) -> Read:
    """model.safetensors.index.json."""
    read = _hub(bases, draw, folder, "gpt2")
    names = ["a.safetensors", "b.safetensors"]
    (folder / "hf" / "model.safetensors").rename(folder / "hf" / names[0])
    weights = {f"transformer.h.{n}.w": draw.choice(names[:1] * 9 + names[1:]) for n in range(5)}
    data = mutated_json(draw, {"metadata": {"total_size": 5}, "weight_map": weights})
    (folder / "hf" / "model.safetensors.index.json").write_bytes(data)
    return read


def header(bases: Bases, draw: random.Random, folder: Path) -> Read:
    """The header of a safetensors file, and its length."""
    read = _hub(bases, draw, folder)
    file = folder / "hf" / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    text = mutated_json(draw, json.loads(whole[8 : 8 + size]))
    length = len(text) if draw.random() < 0.9 else draw.choice((0, 1, size, 2**31, 2**63, 2**64 - 1, len(text) + 1))
    file.write_bytes(length.to_bytes(8, "little") + text + whole[8 + size :])
    return read


def config(bases: Bases, draw: random.Random, folder: Path) -> Read:
    """config.json of every family."""
    read = _hub(bases, draw, folder)
    file = folder / "hf" / "config.json"
    file.write_bytes(mutated_json(draw, json.loads(file.read_text())))
    return read


def tokenizer(bases: Bases, draw: random.Random, folder: Path) -> Read:
    """tokenizer.json, and the tokenizer_config.json beside it."""
    shutil.copytree(draw.choice(bases.tokenizers), folder / "t")
    file = folder / "t" / draw.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    file.write_bytes(mutated_json(draw, json.loads(file.read_text())))

    def read() -> None:
        found = Tokenizer.load(folder / "t")
        found.check_lossless()
        found.decode(found.encode(TEXTS[1]))

    return read


def gin(bases: Bases, draw: random.Random, folder: Path) -> Read:
    """A gin file, or one that it includes."""
    texts = {"run.gin": GIN, "part.gin": PART}
    for name, text in texts.items():
        (folder / name).write_text(text)
    name = draw.choice(list(texts))
    (folder / name).write_bytes(mutated_gin(draw, texts[name]))
    return lambda: load([folder / "run.gin"])


def jsonl(bases: Bases, draw: random.Random, folder: Path) -> Read:
    """Lines of JSON."""
    lines = bases.lines.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    lines[place] = mutated_json(draw, json.loads(lines[place])) + b"\n"
    data = b"".join(lines)
    return _corpus(folder / "a.jsonl", mutated_bytes(draw, data) if draw.random() < 0.2 else data)


def packed(bases: Bases, draw: random.Random, folder: Path) -> Read:
    """Lines packed by gzip or zstd, in one or two frames, with one to skip."""
    parts = [bases.lines[:300], bases.lines[300:]] if draw.random() < 0.5 else [bases.lines]
    if draw.random() < 0.5:
        return _corpus(folder / "a.jsonl.gz", mutated_bytes(draw, b"".join(gzip.compress(p, mtime=0) for p in parts)))
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" if draw.random() < 0.5 else b""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, write_checksum=draw.random() < 0.5, write_content_size=draw.random() < 0.5
    )
    pack = zstandard.ZstdCompressor(compression_params=parameters).compress
    return _corpus(folder / "a.jsonl.zst", mutated_bytes(draw, skipped + b"".join(map(pack, parts))))


def columns(bases: Bases, draw: random.Random, folder: Path) -> Read:
    """Parquet, with text as one of several types."""
    kinds = (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    table = pyarrow.table({"id": range(len(TEXTS)), "text": pyarrow.array(TEXTS).cast(draw.choice(kinds))})
    stream = io.BytesIO()
    packing = draw.choice(("none", "snappy", "gzip", "zstd"))
    parquet.write_table(table, stream, row_group_size=5, compression=packing, use_dictionary=draw.random() < 0.5)
    return _corpus(folder / "a.parquet", mutated_bytes(draw, stream.getvalue()))


def numbers(bases: Bases, draw: random.Random, folder: Path) -> Read:
    """An array of token ids."""
    stream = io.BytesIO()
    np.save(stream, np.arange(30, dtype=draw.choice((np.int32, np.int64, np.uint8))).reshape(5, 6))
    (folder / "a.npy").write_bytes(mutated_bytes(draw, stream.getvalue()))
    return lambda: read_array(folder / "a.npy")


def _corpus(file: Path, data: bytes) -> Read:
    file.write_bytes(data)
    return lambda: list(read_documents(file, text_field="text"))


READERS = {read.__name__: read for read in (index, header, config, tokenizer, gin, jsonl, packed, columns, numbers)}


def outcome(make: Callable[[Bases, random.Random, Path], Read], bases: Bases, number: int, folder: Path) -> str:
    """`read` or `refused`; else what is wrong with what the reader did with malformed file `number`."""
    folder.mkdir()
    try:
        read = make(bases, random.Random(f"{make.__name__} {number}"), folder)
        before, start = sorted(folder.rglob("*")), time.monotonic()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = _tried(read)
        if (seconds := time.monotonic() - start) > MOST_SECONDS:
            return f"took {seconds:.0f} s"
        if (grown := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 > MOST_BYTES:
            return f"took {grown >> 10} MiB of memory"
        return found if sorted(folder.rglob("*")) == before else "wrote something"
    finally:
        shutil.rmtree(folder)


def _tried(read: Read) -> str:
    try:
        read()
    except ConfigError as error:
        return "refused" if str(error).strip() else "has no message"
    except OSError as error:
        return "refused" if error.errno in PATH_ERRORS else f"raised {error!r}"
    except BaseException as error:  # a panic of Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"raised {type(error).__name__}: {str(error)[:200]}"
    return "read"


def main() -> int:
    """Tries every reader and prints what came of it; 1 if any file was neither read nor refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    # What takes memory without end is then an error of its file, and not the end of the process.
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, resource.RLIM_INFINITY))
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        bases = Bases(Path(place))
        for name in options.readers or READERS:
            start, counts = time.monotonic(), collections.Counter()
            for number in range(options.first, options.first + options.count):
                found = outcome(READERS[name], bases, number, Path(place) / "case")
                if found not in ("read", "refused"):
                    print(f"{name} {number}: {found}", flush=True)
                    found, wrong = "wrong", wrong + 1
                counts[found] += 1
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{name}: {dict(counts)}, {time.monotonic() - start:.0f} s, peak {peak} MiB", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
