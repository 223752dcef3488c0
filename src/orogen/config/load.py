"""Reads gin files into configs and refuses bindings that nothing read; the only file that imports gin."""

import dataclasses
import importlib.util  # noqa: F401  gin 0.5.0 uses it without importing it
import logging
import re
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gin
from gin.config import _LOCATION_PREFIXES
from gin.config_parser import BindingStatement, ConfigParser, ImportStatement, IncludeStatement

from orogen.config.checks import ConfigError
from orogen.config.cluster import ClusterConfig
from orogen.config.curate import CurateConfig
from orogen.config.data import DataConfig
from orogen.config.engine import EngineConfig
from orogen.config.evaluate import EvaluateConfig
from orogen.config.fields import KINDS
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.prune import PruneConfig
from orogen.config.quantize import QuantizeConfig
from orogen.config.reads import require_read, without_unread
from orogen.config.run import PARTS, RunConfig
from orogen.config.search import SearchConfig
from orogen.config.shipped import find
from orogen.config.sweep import Arm, SweepConfig

Part = TypeVar("Part")
MAX_BYTES = 10**5  # of a gin file; ours have 3,000, and gin's time grows with the square for adjacent strings
MAX_FILES = 100
# Fields that earlier versions saved, with the values whose meaning has not changed.
REMOVED = {"PlanConfig.stash": ("copied",)}
MESSAGE = 1000  # characters shown of an unreadable value

for _part in (*KINDS, EngineConfig):
    gin.register(_part)


def load(files: Sequence[str | Path], bindings: Sequence[str] = ()) -> tuple[RunConfig, str]:
    """The RunConfig of `files` with `bindings` on top, and its operative text, which loads to an equal config.

    A part is built if any binding names it, or if none of its fields is required. A file `gin_configs/...` that does
    not exist is looked up among those that come with Orogen. Includes are looked up in the folder of the file in
    `files` that they come from, and in the parent of that folder. Raises ConfigError in one line on anything gin
    refuses (unknown class, field or file), on a value that its field refuses, on a key bound twice in one file or in
    `bindings`, on an import, on bindings that an include overrides or that nothing read, and on settings that nothing
    reads (config/reads.py): gin itself is silent on misspelt macros, unused scopes and duplicate keys.
    """
    config, text = parse(files, bindings)
    return require_read(config), text


def load_saved(file: Path) -> RunConfig:
    """The RunConfig of a `config.gin` that Orogen saved in a folder. A setting that nothing reads gets its default
    instead of being refused: no user wrote these files, and older versions saved such settings. A field that has been
    removed is ignored if its value chose what is now the only behaviour."""
    removed = {
        statement.location.line_num
        for statement in (_statements(file) if file.is_file() else ())
        if isinstance(statement, BindingStatement) and statement.value in REMOVED.get(_field(statement), ())
    }
    if not removed:
        return without_unread(parse([file])[0])
    lines = file.read_text(encoding="utf-8").split("\n")
    return without_unread(parse((), [line for i, line in enumerate(lines, 1) if i not in removed])[0])


def load_engine(
    bindings: Sequence[str], *, rows: int | None = None, length: int | None = None
) -> tuple[PlanConfig | None, EngineConfig]:
    """The plan that bindings choose for an inference engine, None if they bind none, and the engine's own config.

    rows, length: unless bound, slots is the fewest for `rows` requests on that plan, and max_length is `length`. Raises
    ConfigError as `load` does.
    """
    parts, _ = _parts((), bindings, {"plan": PlanConfig, "engine": EngineConfig})
    bound = {tuple(key.split(".")[-2:]) for key in _keys(gin.config_str())}
    plan = parts["plan"] if _binds(PlanConfig, _keys(gin.config_str())) else None
    ranks = 1 if plan is None else plan.data * plan.tensor
    defaults = {"slots": None if rows is None else -(-rows // ranks) * ranks, "max_length": length}
    chosen = {k: v for k, v in defaults.items() if v is not None and (EngineConfig.__name__, k) not in bound}
    return plan, dataclasses.replace(parts["engine"], **chosen)


def load_part(kind: type[Part], files: Sequence[str | Path], bindings: Sequence[str] = ()) -> Part:
    """The one config, of `kind`, that the files bind. Raises ConfigError as `load` does, or if they bind none."""
    return _required(_parts(files, bindings, {"part": kind})[0]["part"], kind)


def load_sweep(files: Sequence[str | Path], bindings: Sequence[str] = ()) -> tuple[SweepConfig, str]:
    """The sweep that the files describe, and the operative text of all that they bind. Raises ConfigError as `load`
    does, or if they bind no SweepConfig."""
    parts, text = _parts(files, bindings, {**PARTS, "sweep": SweepConfig})
    return _required(parts["sweep"], SweepConfig), text


def load_arm(files: Sequence[str | Path], bindings: Sequence[str], arm: Arm) -> RunConfig:
    """The RunConfig of one arm of the sweep that the files describe. Raises ConfigError as `load` does, naming the
    arm."""
    try:
        parts, _ = _parts(files, [*bindings, *arm.bindings], {**PARTS, "sweep": SweepConfig})
        del parts["sweep"]
        return require_read(RunConfig(**parts).check())
    except ConfigError as error:
        raise ConfigError(f"arm {arm.name}: {error}") from None


def load_cluster(
    files: Sequence[str | Path], bindings: Sequence[str] = ()
) -> tuple[RunConfig, ClusterConfig, EngineConfig]:
    """The RunConfig of `files` with `bindings` on top, the cluster that they name, and the engine that serves on it.

    Whether the parts of the run fit together is not checked. Raises ConfigError as `load` does for all else.
    """
    kinds = {**PARTS, "cluster": ClusterConfig, "engine": EngineConfig}
    parts, _ = _parts(files, bindings, kinds)
    cluster, engine = parts.pop("cluster"), parts.pop("engine")
    return require_read(RunConfig(**parts)), cluster, engine


def load_search(
    files: Sequence[str | Path], bindings: Sequence[str] = ()
) -> tuple[ModelConfig | None, SearchConfig, ClusterConfig, EngineConfig]:
    """The model that the files name, None if they name none, the search for smaller ones, and the engine and the
    hardware that it simulates. Raises ConfigError as `load` does, or for settings that this search does not read."""
    kinds = {"model": ModelConfig, "search": SearchConfig, "cluster": ClusterConfig, "engine": EngineConfig}
    parts, _ = _parts(files, bindings, kinds)
    search, bound = parts["search"], {tuple(key.split("/")[-1].split(".")[-2:]) for key in _keys(gin.config_str())}
    idle = {(kind.__name__, "") for kind in (ClusterConfig, EngineConfig)}
    idle = set() if search.simulates else {key for key in bound if (key[0], "") in idle}
    idle |= {(SearchConfig.__name__, name) for name in search.unread()} & bound
    if idle:
        expected = "expected their defaults, since nothing in this search reads them"
        raise ConfigError(f"{', '.join('.'.join(key) for key in sorted(idle))} is bound; {expected}")
    return parts["model"], search, parts["cluster"], parts["engine"]


def load_evaluation(bindings: Sequence[str]) -> tuple[PlanConfig | None, EngineConfig, EvaluateConfig]:
    """The plan that bindings choose for an evaluation, None if they bind none, its engine, and what is evaluated.

    Raises ConfigError as `load` does.
    """
    kinds = {"plan": PlanConfig, "engine": EngineConfig, "evaluate": EvaluateConfig}
    parts, _ = _parts((), bindings, kinds)
    plan = parts["plan"] if _binds(PlanConfig, _keys(gin.config_str())) else None
    require_read(RunConfig(plan=PlanConfig(), evaluate=parts["evaluate"]))
    return plan, parts["engine"], parts["evaluate"]


def load_prune(files: Sequence[str | Path], bindings: Sequence[str] = ()) -> tuple[PruneConfig, RunConfig]:
    """The PruneConfig that the files bind, and the run's parts beside it: the text and the plan of its passes. Raises
    ConfigError as `load` does, or if they bind no PruneConfig."""
    parts, _ = _parts(files, bindings, {**PARTS, "prune": PruneConfig})
    prune = _required(parts.pop("prune"), PruneConfig)
    return prune, require_read(RunConfig(**parts))


def load_quantization(
    files: Sequence[str | Path], bindings: Sequence[str]
) -> tuple[PlanConfig | None, DataConfig | None, QuantizeConfig]:
    """The plan of a calibration and its corpus, None for what nothing binds, and how the model is quantised. Raises
    ConfigError as `load` does, or if they bind no QuantizeConfig."""
    parts, _ = _parts(files, bindings, {"plan": PlanConfig, "data": DataConfig, "quantize": QuantizeConfig})
    if parts["quantize"] is None:
        raise ConfigError("nothing binds QuantizeConfig.format; expected --format, or a gin file with it")
    plan = parts["plan"] if _binds(PlanConfig, _keys(gin.config_str())) else None
    return plan, parts["data"], parts["quantize"]


def load_curation(files: Sequence[str | Path], bindings: Sequence[str] = ()) -> tuple[CurateConfig, str]:
    """The CurateConfig of `files` with `bindings` on top, and its operative text, which loads to an equal config.
    Raises ConfigError as `load` does."""
    parts, text = _parts(files, bindings, {"curate": CurateConfig})
    return _required(parts["curate"], CurateConfig), text


def parse(files: Sequence[str | Path], bindings: Sequence[str] = ()) -> tuple[RunConfig, str]:
    """Like `load`, but without the check that settings are read. Raises ConfigError on everything else that `load`
    refuses."""
    parts, text = _parts(files, bindings, PARTS)
    return RunConfig(**parts).check(), text


def _parts(
    files: Sequence[str | Path], bindings: Sequence[str], kinds: Mapping[str, type]
) -> tuple[dict[str, Any], str]:
    """The parts of a config by name, each of its kind, and their operative text. Raises ConfigError as `parse` does."""
    gin.clear_config()
    logging.disable(logging.ERROR)  # gin logs each folder in which it does not find an include
    try:
        for file in map(Path, files):
            _parse(file)
        _check_bindings(bindings)
        gin.parse_config(list(bindings), skip_unknown=False)
        gin.finalize()
        bound = _keys(gin.config_str())
        parts: dict[str, Any] = {
            name: gin.get_configurable(kind)() if _wanted(kind, bound) else None for name, kind in kinds.items()
        }
    except ConfigError as error:
        raise ConfigError(_first_line(error)) from None
    except (
        ValueError,
        TypeError,
        SyntaxError,
        tokenize.TokenError,
        OSError,
        ImportError,
        LookupError,
        RuntimeError,  # RecursionError is one: a macro that refers to itself, and values nested too deep
        MemoryError,  # Python's parser raises it for values that nest too deep
        OverflowError,
    ) as error:
        raise ConfigError(f"gin: {_first_line(error)}") from None
    finally:
        logging.disable(logging.NOTSET)
    text = gin.operative_config_str()
    read = _keys(text)
    dead = sorted(key for key in bound if key not in read and not any(r.endswith("/" + key) for r in read))
    if dead:
        names = ", ".join(kind.__name__ for kind in kinds.values())
        raise ConfigError(f"bindings that nothing read: {', '.join(dead)}; expected fields of {names}")
    return parts, text


def _required(part: Part | None, kind: type[Part]) -> Part:
    """The part. Raises ConfigError if the files bind none."""
    if part is None:
        raise ConfigError(f"the gin files have no bindings of {kind.__name__}; expected some, with its fields")
    return part


def _wanted(kind: type, bound: Iterable[str]) -> bool:
    """Whether a part of this kind is built: if one of its fields is bound, or if none is required."""
    required = any(f.default is dataclasses.MISSING for f in dataclasses.fields(kind))
    return not required or _binds(kind, bound)


def _binds(kind: type, keys: Iterable[str]) -> bool:
    """Whether one of the keys is a field of `kind`, in any scope."""
    return any(key.split(".")[-2:-1] == [kind.__name__] for key in keys)


def _keys(text: str) -> set[str]:
    """The names left of `=` at the start of a line."""
    return set(re.findall(r"^([^\s#=]+)\s*=", text, flags=re.MULTILINE))


def _parse(file: Path) -> None:
    file = find(file)
    if not file.is_file():
        raise ConfigError(f"gin file {str(file)!r} {'is not a file' if file.exists() else 'does not exist'}")
    file = file.resolve()
    folders = file.parents[:2]
    _check_statements(file, folders, (), [])
    _LOCATION_PREFIXES[:] = map(str, folders)  # gin cannot forget a folder, and prefers the current one
    gin.parse_config_file(str(file), skip_unknown=False)


def _check_bindings(bindings: Sequence[str]) -> None:
    """Refuses what gin accepts in `bindings`: an import, an include, a key bound twice."""
    seen: set[str] = set()
    for statement in ConfigParser("\n".join(bindings), _Delegate()):
        if isinstance(statement, ImportStatement | IncludeStatement):
            name = statement.format() if isinstance(statement, ImportStatement) else f"include {statement.filename!r}"
            raise ConfigError(f"gin bindings: {name}; expected bindings only")
        if isinstance(statement, BindingStatement):
            _check_once(statement, seen, "gin bindings")


def _check_statements(file: Path, folders: Sequence[Path], above: tuple[Path, ...], read: list[Path]) -> set[str]:
    """The keys that `file` and its includes bind. Refuses what gin accepts in them: a key bound twice, an import, a
    loop of includes, too many includes, an include that overrides a binding above it. The later of two includes wins,
    as the later of two files does. read: the files so far, each as often as it is included.
    """
    read.append(file)
    if len(read) > MAX_FILES:
        raise ConfigError(f"{read[0]} includes more than {MAX_FILES} files; expected fewer")
    seen: set[str] = set()
    included: set[str] = set()
    for statement in _statements(file):
        where = f"{file}, line {statement.location.line_num}"
        if isinstance(statement, ImportStatement):
            raise ConfigError(f"{where}: {statement.format()}; expected bindings and includes only")
        if isinstance(statement, IncludeStatement):
            found = next((f / statement.filename for f in folders if (f / statement.filename).is_file()), None)
            if found is None:
                expected = " or ".join(map(str, folders))
                raise ConfigError(f"{where}: include {statement.filename!r} does not exist; expected it in {expected}")
            if found in (*above, file):
                raise ConfigError(f"{where}: include {statement.filename!r} leads back to itself")
            keys = _check_statements(found, folders, (*above, file), read)
            if overridden := sorted(keys & seen):
                raise ConfigError(
                    f"{where}: include {statement.filename!r} overrides {overridden[0]}, which is bound above it; "
                    "expected the include before the binding"
                )
            included |= keys
        if isinstance(statement, BindingStatement):
            _check_once(statement, seen, where)
    return seen | included


def _check_once(statement: BindingStatement, seen: set[str], where: str) -> None:
    """Adds the statement's key to `seen`. Raises ConfigError if it is there already."""
    key = _field(statement)
    key = f"{statement.scope}/{key}" if statement.scope else key
    if key in seen:
        raise ConfigError(f"{where}: {key} is bound twice; expected once")
    seen.add(key)


def _field(statement: BindingStatement) -> str:
    return ".".join(filter(None, (statement.selector.split(".")[-1], statement.arg_name)))


def _statements(file: Path) -> list[Any]:
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ConfigError(f"{file} has {size} bytes; expected a gin file of at most {MAX_BYTES}")
    try:
        with file.open(encoding="utf-8") as stream:
            return list(ConfigParser(stream, _Delegate()))
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{file}: {_first_line(error)}; expected gin bindings") from None


class _Delegate:
    """Lets gin's parser read a file without resolving what its values refer to."""

    def configurable_reference(self, name: str, evaluate: bool) -> str:
        return name

    def macro(self, name: str) -> str:
        return name


def _first_line(error: BaseException) -> str:
    """The message of `error` in one line, without the location that gin appends; gin names a value that it cannot read
    on the second line."""
    text = str(error.args[0]) if isinstance(error, tokenize.TokenError) else str(error).split(" in config string:")[0]
    if token := re.search(r"Failed to parse token '(.*)'", text):
        value = token[1][:MESSAGE]
        return f"cannot read the value {value}; expected a number, a quoted string, True, False, None or a list"
    return next((line.strip()[:MESSAGE] for line in text.splitlines() if line.strip()), type(error).__name__)
