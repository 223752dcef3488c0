"""`orogen generate`, `orogen score` and `orogen serve`. Importing this does not import jax."""

import argparse
import importlib.util
import json
import math
import os
from pathlib import Path

from orogen.command import CHECKPOINT, Command, answer, free_memory, positive
from orogen.config.checks import ConfigError, is_unicode
from orogen.config.plan import PlanConfig

API_KEY = "OROGEN_API_KEY"
SERVE_NEEDS = ("starlette", "uvicorn", "jinja2", "prometheus_client")  # of the extra `serve`
TEMPLATE_NAMES = ("nemotron_nano_2", "nemotron_3_nano", "nemotron_3_5_lightning")
PROMPT = (
    "text to continue. The checkpoint's tokenizer decides what is put around it: bos before it after a run of Orogen's "
    "own; in other folders what the post-processor of tokenizer.json says or, without one, add_bos_token and "
    "add_eos_token of tokenizer_config.json; bos alone if there would be no token at all"
)

INPUT = (
    "answer each line of this file: an object with a prompt, text or a list of token ids, and any field of a request, "
    "such as max_tokens, temperature or stop; the options below hold where a line says nothing. A run that was killed "
    "goes on where it was. Exit status 2 if a line is broken, else 1 if a request failed"
)


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help=CHECKPOINT)
    parser.add_argument("--prompt", default="", metavar="TEXT", help=PROMPT)
    parser.add_argument("--input", type=Path, metavar="IN.jsonl", help=INPUT)
    parser.add_argument("--out", type=Path, metavar="OUT.jsonl", help="answers to --input, in its order")
    parser.add_argument("--tokens", type=positive, default=128)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)


def _add_score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help=CHECKPOINT)
    parser.add_argument("--tokens", type=Path, required=True, metavar="IN.npy", help="integers (batch, time)")
    parser.add_argument("--segments", type=Path, metavar="SEG.npy", help="documents of each row, 0 for padding")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.npz", help="gets `logits` and `logprobs`")


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help=CHECKPOINT)
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, which only this machine reaches)",
    )
    add("--port", type=_port, default=8000, metavar="P", help="port to listen on; 0: any (default: %(default)s)")
    add("--api_key", metavar="KEY", help=f"what clients must send; better in {API_KEY}, for others see command lines")
    add("--name", help="the model's name for clients (default: the checkpoint's folder)")
    add(
        "--chat_template",
        metavar="T",
        help=f"a file in place of the checkpoint's, or one of {', '.join(TEMPLATE_NAMES)}",
    )
    add("--slots", type=positive, metavar="N", help="requests that run at a time: EngineConfig.slots")
    add("--max_length", type=positive, metavar="N", help="tokens of a prompt and its answer: EngineConfig.max_length")
    add("--queue", type=positive, metavar="N", help="requests that may wait: EngineConfig.queue")
    add("--timeout", type=_seconds, default=600.0, metavar="S", help="seconds per request (default: %(default)g)")
    add("--drain_seconds", type=_seconds, default=30.0, metavar="S",
        help="after SIGTERM, time for requests to end (default: %(default)g)")  # fmt: skip
    add("--gin_bindings", action="append", default=[], metavar="X.y=1", help="of EngineConfig and PlanConfig")


def _port(text: str) -> int:
    if not (text.isdigit() and text.isascii()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a port, 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number above 0")
    return value


def generate(options: argparse.Namespace) -> int:
    """`orogen generate`."""
    if not 0 <= options.temperature < math.inf or not 0 < options.top_p <= 1:
        raise ConfigError(
            f"--temperature {options.temperature} --top_p {options.top_p}; expected 0 or more, and above 0 up to 1"
        )
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed {options.seed}; expected a whole number from 0 to 2**63 - 1")
    if not is_unicode(options.prompt):
        raise ConfigError(f"--prompt {options.prompt!r}; expected valid UTF-8")
    if options.input is not None or options.out is not None:
        return _generate_lines(options)
    from orogen.checkpoint.open import open_folder, read_model
    from orogen.infer.generate import generate as run
    from orogen.simulate.fit import require_inference_fits

    with open_folder(options.checkpoint) as folder:
        require_inference_fits(
            folder.config,
            free_memory(),
            blocked=_goes_by_blocks(folder.plan),
            rows=1,
            tokens=options.tokens,
            settings={"--tokens": options.tokens},
        )
        opened = read_model(folder)
    (text,) = run(
        opened,
        [options.prompt],
        tokens=options.tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    answer(options, {"prompt": options.prompt, "text": text}, [options.prompt + text])
    return 0


def _generate_lines(options: argparse.Namespace) -> int:
    """`orogen generate --input IN.jsonl --out OUT.jsonl`."""
    if options.input is None or options.out is None or options.prompt:
        raise ConfigError("--input, --out and --prompt: expected the first two together, or --prompt without them")
    if not options.input.is_file() or not options.out.parent.is_dir():
        raise ConfigError(
            f"--input {options.input} --out {options.out}; expected a file, and one in a folder that exists"
        )
    from orogen.checkpoint.open import open_folder, read_model
    from orogen.infer.batch import run_batch
    from orogen.infer.engine import Engine
    from orogen.infer.lines import LineReader

    with open_folder(options.checkpoint) as folder:
        opened = read_model(folder)
    defaults = {"max_tokens": options.tokens, "temperature": options.temperature, "top_p": options.top_p}
    encode = None if opened.tokenizer is None else opened.tokenizer.prompt_ids
    reader = LineReader(defaults, encode=encode, seed=options.seed)
    settings = json.dumps([str(options.checkpoint.resolve()), defaults, options.seed])
    done = run_batch(Engine(opened), options.input, options.out, reader=reader, settings=settings)
    lines = f"{done.lines} lines answered in {options.out}, of which {done.broken} were broken and {done.failed} failed"
    answer(options, {"out": str(options.out), **done._asdict()}, [lines])
    return done.status


def score(options: argparse.Namespace) -> int:
    """`orogen score`."""
    from orogen.checkpoint.open import open_folder, read_model
    from orogen.infer.score import read_array, write_arrays
    from orogen.infer.score import score as run
    from orogen.simulate.fit import require_scoring_fits

    if not options.out.parent.is_dir():
        raise ConfigError(f"--out {str(options.out)!r}; expected a file in a folder that exists")
    tokens_bt = read_array(options.tokens)
    segments_bt = read_array(options.segments) if options.segments else None
    with open_folder(options.checkpoint) as folder:
        if tokens_bt.ndim == 2 and tokens_bt.size:  # anything else is refused by its shape
            rows, length = tokens_bt.shape
            blocked = _goes_by_blocks(folder.plan)
            require_scoring_fits(folder.config, free_memory(), blocked=blocked, rows=rows, tokens=length)
        opened = read_model(folder, tokenizer=False)
    scores = run(opened, tokens_bt, segments_bt)
    write_arrays(options.out, scores)
    shape = list(scores["logits"].shape)
    answer(options, {"out": str(options.out), "logits": shape}, [f"logits {shape} in {options.out}"])
    return 0


def serve(options: argparse.Namespace) -> int:
    """`orogen serve`."""
    if missing := [name for name in SERVE_NEEDS if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{', '.join(missing)} not installed; expected what `pip install 'orogen[serve]'` installs")
    from orogen.checkpoint.open import open_model
    from orogen.config.load import load_engine
    from orogen.infer.chat import Chat, find_template
    from orogen.infer.engine import Engine
    from orogen.infer.serve.app import make_app
    from orogen.infer.serve.exchange import Settings
    from orogen.infer.serve.run import listen, make_server, run
    from orogen.infer.service import Service

    key = os.environ.get(API_KEY) if options.api_key is None else options.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise ConfigError(f"--api_key or {API_KEY} is empty or no plain ASCII; expected a key, or none of both")
    chosen = {name: getattr(options, name) for name in ("slots", "max_length", "queue")}
    bindings = [f"EngineConfig.{name} = {value}" for name, value in chosen.items() if value is not None]
    plan, config = load_engine([*options.gin_bindings, *bindings])
    with listen(options.host, options.port) as bound:  # before the model is read, which may take minutes
        opened = open_model(options.checkpoint, plan, config.compute_dtype)
        words = opened.tokenizer
        template = find_template(options.checkpoint, words, options.chat_template) if words is not None else None
        chat = None if words is None or template is None else Chat(words, template)
        engine = Engine(opened, config)
        service = Service(engine, limit=config.slots + config.queue)
        name = options.name or options.checkpoint.resolve().name
        settings = Settings(name=name, most=engine.length, key=key, timeout=options.timeout)

        def ready(host: str, port: int) -> None:
            if options.json:
                print(json.dumps({"host": host, "port": port, "model": name}), flush=True)

        app = make_app(service, settings, tokenizer=words, chat=chat)
        return run(make_server(app, service, drain_seconds=options.drain_seconds, ready=ready), bound)


def _goes_by_blocks(plan: PlanConfig | None) -> bool:
    """Whether attention goes by blocks: the plan of a run decides."""
    return plan is not None and plan.attention == "blocked"


GENERATE = Command(
    name="generate",
    help="sample text from a trained model",
    examples=(
        "orogen generate --checkpoint runs/quickstart --prompt 'import '",
        "orogen generate --checkpoint HF_FOLDER --prompt 'import ' --tokens 32 --temperature 0",
        "orogen generate --checkpoint HF_FOLDER --input prompts.jsonl --out answers.jsonl",
    ),
    add_arguments=_add_generate_arguments,
    run=generate,
)
SCORE = Command(
    name="score",
    help="logits and log-probabilities of given tokens",
    examples=(
        "orogen score --checkpoint runs/quickstart --tokens in.npy --out out.npz",
        "orogen score --checkpoint HF_FOLDER --tokens in.npy --segments documents.npy --out out.npz",
    ),
    add_arguments=_add_score_arguments,
    run=score,
)
SERVE = Command(
    name="serve",
    help="answer requests over HTTP, as OpenAI's interface has them",
    examples=(
        "orogen serve --checkpoint runs/quickstart --port 8000",
        "orogen serve --checkpoint HF_FOLDER --host 0.0.0.0 --slots 32 --max_length 8192",
        "orogen serve --checkpoint HF_FOLDER --gin_bindings 'PlanConfig.tensor=2' "
        "--gin_bindings \"EngineConfig.compute_dtype='bfloat16'\"",
    ),
    add_arguments=_add_serve_arguments,
    run=serve,
)
