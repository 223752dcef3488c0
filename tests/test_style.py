"""Structure of the code: who may import whom, and what may appear only in one place.

A check takes a file's path under src/orogen and its syntax tree, and yields one line per breach.
"""

import ast
import functools
import graphlib
import pathlib
import re
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = ROOT / "src" / "orogen"
RECIPES = ROOT / "gin_configs" / "recipes"

# A package imports those before it; `commands` are the packages' command.py, which declare parts of the command line.
ORDER = (
    "__init__ config parallel kernels precision layers moe model cost data convert checkpoint report train infer "
    "posttrain evaluate simulate compress vision bench command launch sweep commands cli"
).split()
# Packages that may import less than the order allows.
ONLY = {"data": ["config"], "report": ["config"]}
FREE_OF_JAX = (
    "config/",
    "parallel/fold.py",
    "parallel/legal.py",
    "parallel/schedule.py",
    "cost/dispatches.py",
    "cost/kept.py",
    "cost/kind",
    "cost/local.py",
    "cost/operation.py",
    "cost/weight",
)

PLACEMENT = {"PartitionSpec", "shard_map"}
COLLECTIVES = set(
    "psum pmean pmax pmin psum_scatter all_gather all_gather_invariant all_gather_reduced all_to_all ragged_all_to_all "
    "ppermute pshuffle pswapaxes pbroadcast psend precv pcast pvary axis_index axis_size".split()
)
ASKS_FOR_DEVICES = re.compile(
    r"jax\.(local_)?devices?(_count)?|jax\.process_(index|count)|jax\.default_backend|jax\.make_mesh|"
    r"(mesh_utils\.)?create_device_mesh|(jax\.)?random\.\w+|"
    r"(jnp|jax\.numpy)\.(array|asarray|zeros|ones|full|arange|linspace|eye)"
)


def place(name: str) -> str:
    """Where a module, or what it holds, stands in ORDER: `config` for `config.load`, `commands` for `train.command`."""
    package, *inside = name.split(".")
    return "commands" if inside[:1] == ["command"] else package


def imports(path: str, tree: ast.AST) -> Iterator[str]:
    """Every imported name, dotted and absolute; `from a import b` gives `a.b`."""
    folder = ["orogen", *path.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`a.b.c` for that expression; empty for one that is not a chain of names."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the prefixes, or below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def import_order(path: str, tree: ast.AST) -> Iterator[str]:
    """Breaches of ORDER and ONLY."""
    source = place(path.removesuffix(".py").replace("/", "."))
    if source not in ORDER:
        yield f"{source} has no place in tests/test_style.py"
        return
    below = ONLY.get(source, ORDER[: ORDER.index(source)])
    for name in imports(path, tree):
        target = place(name.removeprefix("orogen."))
        if name.startswith("orogen.") and target != source and target not in below:
            yield f"imports {name}"


def module_graph(trees: dict[str, ast.AST]) -> dict[str, set[str]]:
    """By module, the modules that it imports, at its head or within a function, and the packages that these are in."""
    names = {path: ".".join(["orogen", *path.removesuffix(".py").split("/")]) for path in trees}
    names = {path: name.removesuffix(".__init__") for path, name in names.items()}
    graph: dict[str, set[str]] = {name: set() for name in names.values()}
    for path, source in names.items():
        for name in imports(path, trees[path]):
            parts = name.split(".")
            found = {".".join(parts[:n]) for n in range(1, len(parts) + 1)} & graph.keys()
            longest = max(found, key=len, default=source)
            graph[source] |= {m for m in found if m == longest or not f"{source}.".startswith(f"{m}.")} - {source}
    return graph


def jax_free(path: str, tree: ast.AST) -> Iterator[str]:
    if path.startswith(FREE_OF_JAX):
        yield from (f"imports {n}" for n in imports(path, tree) if within(n, ("jax", "jaxlib", "flax", "optax")))


def gin_only_in_load(path: str, tree: ast.AST) -> Iterator[str]:
    if path != "config/load.py":
        yield from (f"imports {name}" for name in imports(path, tree) if within(name, ("gin",)))


def source_stands_alone(path: str, tree: ast.AST) -> Iterator[str]:
    yield from (f"imports {name}" for name in imports(path, tree) if within(name, ("tests", "experiments")))


def placement_only_in_parallel(path: str, tree: ast.AST) -> Iterator[str]:
    if path.startswith("parallel/"):
        return
    for name in imports(path, tree):
        if name.split(".")[-1] in PLACEMENT or name.startswith("jax.lax.") and name.split(".")[-1] in COLLECTIVES:
            yield f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_lax = dotted(node.value).split(".")[-1] == "lax"
            if node.attr in PLACEMENT or of_lax and node.attr in COLLECTIVES:
                yield f"line {node.lineno}: {dotted(node) or node.attr}"


def weights_are_read_through_doors(path: str, tree: ast.AST) -> Iterator[str]:
    """Where a product's format is chosen: `layers/linear.py`; and `layers/embedding.py`, whose rows are looked up."""
    if path.startswith("parallel/") or path in ("layers/linear.py", "layers/embedding.py"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func).split(".")[-2:] == ["plan", "weight"]:
            yield f"line {node.lineno}: reads a weight beside the doors of layers/linear.py"


def no_swallowed_exceptions(path: str, tree: ast.AST) -> Iterator[str]:
    """Bare handlers, empty handlers, `suppress`, and broad handlers that neither raise nor use the exception."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            inside = [inner for statement in node.body for inner in ast.walk(statement)]
            types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(isinstance(t, ast.Name) and t.id in ("Exception", "BaseException") for t in types)
            used = any(isinstance(n, ast.Raise) or isinstance(n, ast.Name) and n.id == node.name for n in inside)
            empty = all(
                isinstance(s, ast.Pass) or isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)
                for s in node.body
            )
            if node.type is None or empty or (broad and not used):
                yield f"line {node.lineno}: swallows an exception"
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "suppress":
            yield f"line {node.lineno}: swallows an exception"


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below this one that run when the module is imported: all but the bodies of functions."""
    for field, value in ast.iter_fields(node):
        if field == "body" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from run_at_import(child)


def short(path: str, tree: ast.AST) -> Iterator[str]:
    """Files, functions and lists of arguments that a reader can hold in mind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module) and (lines := getattr(node.body[-1], "end_lineno", 0)) > 350:
            yield f"{lines} lines; expected at most 350"
        if isinstance(node, ast.FunctionDef):
            if (lines := (node.end_lineno or 0) - node.lineno + 1) > 60:
                yield f"{node.name} has {lines} lines; expected at most 60"
            arguments = [a.arg for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
            if len(arguments) > 5 and not path.startswith("kernels/"):
                yield f"{node.name} takes {len(arguments)} arguments by position; expected at most 5"


def no_devices_at_import(path: str, tree: ast.AST) -> Iterator[str]:
    for node in run_at_import(tree):
        if isinstance(node, ast.Call) and ASKS_FOR_DEVICES.fullmatch(dotted(node.func)):
            yield f"line {node.lineno}: {dotted(node.func)} starts a backend at import"


def unexplained(recipe: str, text: str) -> bool:
    """Whether a recipe lacks, in its opening comment, the command that runs it."""
    lines = text.splitlines()
    opening = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return not re.search(rf"orogen .*--gin_file gin_configs/recipes/{re.escape(recipe)}\b", "\n".join(opening))


# Beside each check, files that it must refuse.
CHECKS: dict[Callable[[str, ast.AST], Iterator[str]], list[tuple[str, str]]] = {
    import_order: [
        ("layers/norm.py", "from orogen.model import lm"),
        ("layers/norm.py", "from ..model.lm import LM"),
        ("layers/norm.py", "def f():\n    import orogen.train.loop"),
        ("config/model.py", "import orogen.parallel.fold"),
        ("data/loader.py", "from orogen import parallel"),
        ("model/lm.py", "from orogen.data import loader"),
        ("cost/flops.py", "from orogen.train import step"),
        ("model/stages.py", "from orogen.cost import flops"),
        ("data/loader.py", "from orogen.cost.flops import peak_flops"),
        ("report/page.py", "from orogen.train import loop"),
        ("report/page.py", "from orogen.data import loader"),
        ("infer/engine.py", "from orogen.simulate import fit"),
        ("train/loop.py", "from orogen.simulate import memory"),
        ("convert/names.py", "from orogen.evaluate import summary"),
        ("convert/names.py", "from orogen.checkpoint import folders"),
        ("checkpoint/steps.py", "from orogen.train.state import TrainState"),
        ("command.py", "from orogen.train.command import TRAIN"),
        ("simulate/fit.py", "from orogen.command import answer"),
        ("__init__.py", "from orogen import cli"),
        ("utils/misc.py", ""),
        ("infer/score.py", "from orogen.infer.command import SCORE"),
        ("config/load.py", "from orogen import command"),
    ],
    jax_free: [("config/plan.py", "import jax.numpy as jnp"), ("parallel/fold.py", "from jax import lax")],
    gin_only_in_load: [("cli.py", "import gin"), ("config/model.py", "from gin import register")],
    source_stands_alone: [("cli.py", "from tests import helpers"), ("bench/a.py", "import experiments.a.run")],
    placement_only_in_parallel: [
        ("moe/layer.py", "from jax.sharding import PartitionSpec as P"),
        ("moe/layer.py", "spec = jax.sharding.PartitionSpec('data')"),
        ("moe/layer.py", "y = jax.shard_map(f)"),
        ("moe/layer.py", "from jax.lax import psum"),
        ("moe/layer.py", "y = lax.all_to_all(x, 'expert', 0, 0)"),
    ],
    weights_are_read_through_doors: [
        ("model/lm.py", "y = x @ plan.weight(self.out)"),
        ("moe/experts.py", "w = self.plan.weight(weight)"),
    ],
    no_swallowed_exceptions: [
        ("cli.py", "try:\n    f()\nexcept:\n    raise"),
        ("cli.py", "try:\n    f()\nexcept Exception:\n    pass"),
        ("cli.py", "try:\n    f()\nexcept (KeyError, Exception) as error:\n    x = 1"),
        ("cli.py", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("cli.py", "with contextlib.suppress(KeyError):\n    f()"),
    ],
    short: [
        ("train/loop.py", "x = 1\n" * 351),
        ("train/loop.py", "def f():\n" + "    x = 1\n" * 60),
        ("train/loop.py", "def f(a, b, c, d, e, g):\n    return a"),
    ],
    no_devices_at_import: [
        ("train/a.py", "N = len(jax.devices())"),
        ("train/a.py", "def f(n=jax.device_count()):\n    return n"),
        ("train/a.py", "class A:\n    key = jax.random.key(0)"),
        ("train/a.py", "MASK = jnp.zeros((2, 3))"),
    ],
}

# What every check must let pass.
ACCEPTED = [
    ("config/load.py", "import gin\nfrom orogen.config import model"),
    ("cli.py", "from orogen.simulate import memory\nfrom orogen.data import loader\nimport orogen.train.loop"),
    ("train/loop.py", "from orogen.checkpoint.steps import Checkpoints"),
    ("checkpoint/folders.py", "from orogen.convert import names\nfrom orogen.cost.assemble import assemble"),
    ("cost/ledger.py", "from orogen.model.lm import build\nfrom . import weights"),
    ("simulate/aot.py", "from orogen.train import step"),
    ("command.py", "from orogen.simulate.fit import Memory"),
    ("infer/command.py", "from orogen.command import Command\nfrom orogen.simulate import fit"),
    ("cli.py", "from orogen.infer.command import SCORE"),
    ("train/loop.py", "from orogen.cost.flops import flops_per_token"),
    ("train/command.py", "from orogen.evaluate.summary import summarise"),
    ("parallel/plan.py", "from jax.sharding import PartitionSpec\nfrom jax import lax\ny = lax.psum(1, 'data')"),
    ("moe/layer.py", "y = plan.sum(x) + lax.scan(f, x, None)\nimport jax.numpy as jnp\nBIG = jnp.finfo(jnp.float32)"),
    ("cli.py", "try:\n    f()\nexcept Exception as error:\n    report(error)"),
    ("cli.py", "try:\n    f()\nexcept KeyError:\n    y = None"),
    ("train/loop.py", "def f():\n    return jax.devices()"),
    ("layers/linear.py", "y = x @ plan.weight(w)"),
    ("model/lm.py", "y = linear(x, self.out.weight, plan)"),
]


@functools.cache
def parsed_source() -> dict[str, ast.AST]:
    """The syntax tree of every file, by its path."""
    files = sorted(SOURCE.rglob("*.py"))
    assert files, f"no code under {SOURCE}"
    return {file.relative_to(SOURCE).as_posix(): ast.parse(file.read_text()) for file in files}


@pytest.mark.parametrize("check", CHECKS)
def test_source_keeps_to(check):
    assert [f"{path}: {breach}" for path, tree in parsed_source().items() for breach in check(path, tree)] == []


def test_few_functions_are_long():
    """At most ten have more than 45 lines."""
    functions = [n for tree in parsed_source().values() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert sum((node.end_lineno or 0) - node.lineno + 1 > 45 for node in functions) <= 10


def test_no_module_imports_itself_through_others():
    graph = module_graph(parsed_source())
    assert "orogen.config.model" in graph["orogen.cost.flops"]
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "texts",
    [
        {"layers/a.py": "from orogen.layers import b", "layers/b.py": "def f():\n    from orogen.layers.a import g"},
        {"kernels/ssd/__init__.py": "from orogen.kernels.conv.taps import f", "kernels/conv/taps.py": "",
         "kernels/conv/__init__.py": "from orogen.kernels.ssd import passing", "kernels/ssd/passing.py": ""},
        {"cli.py": "import orogen.command", "command.py": "from .cli import main"},
    ],
)  # fmt: skip
def test_a_circle_of_imports_is_noticed(texts):
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(module_graph({path: ast.parse(text) for path, text in texts.items()})).prepare()


@pytest.mark.parametrize(("check", "path", "text"), [(c, *bad) for c, cases in CHECKS.items() for bad in cases])
def test_check_refuses(check, path, text):
    assert list(check(path, ast.parse(text)))


@pytest.mark.parametrize(("path", "text"), ACCEPTED)
def test_checks_let_pass(path, text):
    assert [breach for check in CHECKS for breach in check(path, ast.parse(text))] == []


def test_recipes_begin_with_their_command():
    files = sorted(RECIPES.rglob("*.gin"))
    assert [f.name for f in files if unexplained(f.relative_to(RECIPES).as_posix(), f.read_text())] == []


def test_recipe_without_its_command_is_noticed():
    command = "orogen train --gin_file gin_configs/recipes/a.gin --run runs/a"
    assert not unexplained("a.gin", f"# Tiny.\n# {command}\nX.y = 1\n")
    assert unexplained("a.gin", "X.y = 1\n")
    assert unexplained("a.gin", f"X.y = 1\n# {command}\n")
    assert unexplained("b.gin", f"# {command}\n")


@functools.cache
def held(name: str) -> set[str]:
    """What a module of the source holds: what it defines, imports and assigns outside functions and classes, and its
    submodules; nothing if there is none."""
    path = SOURCE.parent / name.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = {one.stem for one in path.iterdir()} if path.is_dir() else set()
    inside = [ast.parse(file.read_text())] if file.is_file() else []
    while inside:
        node = inside.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        inside += ast.iter_child_nodes(node)
    return found


def missing(tree: ast.AST) -> Iterator[str]:
    """Names and modules that a file imports from the source and that are not there."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and within(node.module or "", ("orogen",)):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if within(alias.name, ("orogen",)) and alias.name != "orogen"]
        for name in names:
            module, _, last = name.rpartition(".")
            if last not in held(module):
                yield name


def test_experiments_import_what_there_is():
    """They are run seldom, and a name that has moved would be noticed on a machine lent for an hour."""
    files = sorted((ROOT / "experiments").rglob("*.py"))
    assert {(f.name, name) for f in files for name in missing(ast.parse(f.read_text()))} == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from orogen.parallel.mesh import make_mesh", []),
        ("from orogen.parallel import mesh", []),
        ("import orogen.parallel.mesh", []),
        ("from orogen.parallel.mesh import fold_plan", ["orogen.parallel.mesh.fold_plan"]),
        ("from orogen.parallel.mesh import backend", ["orogen.parallel.mesh.backend"]),  # of a function
        ("from orogen.cost.kinds.mlp import tuple", ["orogen.cost.kinds.mlp.tuple"]),  # only read there
        ("import orogen.parallel.gone", ["orogen.parallel.gone"]),
        ("from orogen.gone.mesh import make_mesh", ["orogen.gone.mesh.make_mesh"]),
    ],
)
def test_an_import_of_what_is_not_there_is_noticed(text, found):
    assert list(missing(ast.parse(text))) == found
