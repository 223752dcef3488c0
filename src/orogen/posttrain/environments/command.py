"""`orogen environments`. Importing this does not import jax."""

import argparse
import contextlib
import importlib.util
import json
from pathlib import Path

from orogen.command import Command, add_config_arguments, answer, load_config
from orogen.config.checks import ConfigError
from orogen.config.streams import say
from orogen.infer.options import port

NEEDS = ("starlette", "uvicorn")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = (
        "serve: a resources server of NeMo Gym's contract; write: the tasks as a data set for Gym's agents, whose "
        "answers that server verifies"
    )
    parser.add_argument("action", choices=("serve", "write"), help=actions)
    add_config_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="OUT.jsonl", help="of write: gets a line per task")
    shown = "of serve: address to listen on (default: %(default)s, which only this machine reaches)"
    parser.add_argument("--host", default="127.0.0.1", help=shown)
    listens = "of serve: port to listen on; 0: any (default: %(default)s)"
    parser.add_argument("--port", type=port, default=8001, metavar="P", help=listens)


def environments(options: argparse.Namespace) -> int:
    """`orogen environments`."""
    if (options.action == "write") != (options.out is not None):
        raise ConfigError(f"environments {options.action}: expected --out with write, and with write alone")
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        expected = "expected what `pip install 'orogen[serve]'` installs"
        raise ConfigError(f"{', '.join(missing)} not installed; {expected}")
    from orogen.posttrain.environments.make import make_environment
    from orogen.posttrain.environments.pool import Pool
    from orogen.posttrain.environments.server import GymServer, task_rows

    rl = load_config(options, "rl")[0].rl
    made = {one.name: make_environment(one) for one in rl.environments}
    if options.action == "write":
        return _write(options, list(task_rows(made)))
    from orogen.infer.serve.run import listen
    from orogen.posttrain.environments.running import run

    with contextlib.ExitStack() as held:
        bound = held.enter_context(listen(options.host, options.port))
        pools = {}
        for one in rl.environments:
            pools[one.name] = held.enter_context(contextlib.closing(Pool(one, workers=rl.workers)))

        def ready(host: str, port: int) -> None:
            say(f"orogen: {', '.join(made)} on http://{f'[{host}]' if ':' in host else host}:{port}")
            if options.json:
                print(json.dumps({"host": host, "port": port, "environments": list(made)}), flush=True)

        return run(GymServer(made, pools).app(), bound, ready)


def _write(options: argparse.Namespace, rows: list[dict[str, object]]) -> int:
    from orogen.config.files import write_atomically

    if not options.out.parent.is_dir() or options.out.is_dir():
        raise ConfigError(f"--out {str(options.out)!r}; expected a file in a folder that exists")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(options.out, lines.encode("utf-8", "surrogatepass"))
    answer(options, {"out": str(options.out), "tasks": len(rows)}, [f"{len(rows):,} tasks in {options.out}"])
    return 0


ENVIRONMENTS = Command(
    name="environments",
    help="serve environments of reinforcement learning to NeMo Gym's agents, or write their tasks",
    examples=(
        "orogen environments write --gin_file gin_configs/posttrain/rl_toy.gin --out tasks.jsonl",
        "orogen environments serve --gin_file gin_configs/posttrain/rl_toy.gin --port 8001",
    ),
    add_arguments=_add_arguments,
    run=environments,
)
