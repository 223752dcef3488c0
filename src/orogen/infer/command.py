"""`orogen generate`, `orogen score` and `orogen serve`. Importing this does not import jax."""

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orogen.command import CHECKPOINT, EXIT_FAILURE, Command, answer, fail, free_memory, positive
from orogen.config.checks import ConfigError
from orogen.config.engine import IN_FP8, EngineConfig
from orogen.config.plan import PlanConfig
from orogen.infer.options import add_request_options, fields_of, port, seconds
from orogen.infer.request import ERROR, held_back

if TYPE_CHECKING:
    from orogen.data.tokenizer import Tokenizer
    from orogen.infer.chat import Chat
    from orogen.infer.sight import Sees

TOKENS = 128  # most new tokens, unless a request says otherwise
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

CHAT = (
    "converse in the terminal: answers appear as they are made, with tokens per second. Also where stdin is a terminal "
    "and there is no --prompt and no --input. Without a chat template every line is continued by itself"
)
TEMPLATE = f"a file in place of the checkpoint's chat template, or one of {', '.join(TEMPLATE_NAMES)}"
MOST = f"most new tokens (default: {TOKENS}; in a conversation, as many as there is room for)"
BINDINGS = "of EngineConfig and PlanConfig, such as EngineConfig.slots=32 or PlanConfig.tensor=2; may be repeated"


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help=CHECKPOINT)
    parser.add_argument("--prompt", metavar="TEXT", help=PROMPT)
    parser.add_argument("--chat", action="store_true", help=CHAT)
    parser.add_argument("--input", type=Path, metavar="IN.jsonl", help=INPUT)
    parser.add_argument("--out", type=Path, metavar="OUT.jsonl", help="answers to --input, in its order")
    parser.add_argument("--tokens", "--max_tokens", type=positive, metavar="N", dest="tokens", help=MOST)
    add_request_options(parser)
    parser.add_argument("--chat_template", metavar="T", help=TEMPLATE)
    parser.add_argument("--gin_bindings", action="append", default=[], metavar="X.y=1", help=BINDINGS)


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
    add("--port", type=port, default=8000, metavar="P", help="port to listen on; 0: any (default: %(default)s)")
    add("--api_key", metavar="KEY", help=f"what clients must send; better in {API_KEY}, for others see command lines")
    add("--name", help="the model's name for clients (default: the checkpoint's folder)")
    add("--chat_template", metavar="T", help=TEMPLATE)
    add("--slots", type=positive, metavar="N", help="requests that run at a time: EngineConfig.slots")
    add("--max_length", type=positive, metavar="N", help="tokens of a prompt and its answer: EngineConfig.max_length")
    add("--queue", type=positive, metavar="N", help="requests that may wait: EngineConfig.queue")
    add("--timeout", type=seconds, default=600.0, metavar="S", help="seconds per request (default: %(default)g)")
    add("--drain_seconds", type=seconds, default=30.0, metavar="S",
        help="after SIGTERM, time for requests to end (default: %(default)g)")  # fmt: skip
    add("--priorities", action="store_true", help="let clients say which of their requests go before those of others")
    add("--weights", type=Path, metavar="DIR", help="let clients load other weights, of checkpoints in this folder")
    add("--gin_bindings", action="append", default=[], metavar="X.y=1", help=BINDINGS)


def generate(options: argparse.Namespace) -> int:
    """`orogen generate`."""
    ways = [options.prompt is not None, options.input is not None or options.out is not None, options.chat]
    if sum(ways) > 1 or (options.input is None) != (options.out is None):
        raise ConfigError("--prompt, --chat, --input with --out: expected one of them, the last two together")
    fields = fields_of(options)
    if options.logprobs is not None and not (options.json or options.input):
        raise ConfigError(f"--logprobs {options.logprobs}; expected --json or --input with it, which show them")
    if options.input is not None:
        return _generate_lines(options, fields)
    if options.chat or (options.prompt is None and not options.json and sys.stdin is not None and sys.stdin.isatty()):
        return _converse(options, fields)
    return _generate_text(options, fields)


def _generate_text(options: argparse.Namespace, fields: dict[str, Any]) -> int:
    """`orogen generate --prompt TEXT`."""
    from orogen.config.load import load_engine
    from orogen.infer.engine import Engine
    from orogen.infer.generate import check_length, rounded
    from orogen.infer.lines import request_of, told

    prompt, tokens = options.prompt or "", _most(fields)
    opened, _ = _open(
        options.checkpoint, options.gin_bindings, rows=1, length=rounded(tokens + 1), settings={"--tokens": tokens}
    )
    if opened.tokenizer is None:
        raise ConfigError("the checkpoint has no tokenizer.json; expected one, to read the prompt with")
    ids = opened.tokenizer.prompt_ids(prompt)
    check_length(opened, len(ids), tokens)
    _, config = load_engine(options.gin_bindings, rows=1, length=rounded(len(ids) + tokens))
    request = held_back(request_of(ids, fields | {"max_tokens": tokens}), opened.tokenizer.end_ids)
    try:
        (outputs,) = Engine(opened, config).run([request])
    except ConfigError as error:
        option = "--regex" if options.json_schema is None else f"--json_schema {options.json_schema}"
        raise ConfigError(str(error).replace("Grammar.text", option)) from None
    text, chosen = "".join(o.text for o in outputs), [c for o in outputs for c in o.tokens]
    finish, error = outputs[-1].finish or "", outputs[-1].error
    answer(options, {"prompt": prompt, **told(chosen=chosen, text=text, finish=finish)}, [prompt + text])
    return fail(error, EXIT_FAILURE) if finish == ERROR else 0


def _most(fields: Mapping[str, Any]) -> int:
    """The most new tokens where there is no conversation."""
    return fields["max_tokens"] or max(TOKENS, fields.get("min_tokens", 0))


def _generate_lines(options: argparse.Namespace, fields: dict[str, Any]) -> int:
    """`orogen generate --input IN.jsonl --out OUT.jsonl`."""
    if not options.input.exists() or options.input.is_dir() or not options.out.parent.is_dir():
        raise ConfigError(
            f"--input {options.input} --out {options.out}; expected a file or pipe, and a file in a folder that exists"
        )
    from orogen.infer.batch import run_batch
    from orogen.infer.engine import Engine
    from orogen.infer.lines import LineReader

    defaults = fields | {"max_tokens": _most(fields)}
    seed = defaults.pop("seed")
    opened, config = _open(options.checkpoint, options.gin_bindings)
    words = opened.tokenizer
    encode, end_ids = (None, ()) if words is None else (words.prompt_ids, words.end_ids)
    chat = _chat(options, opened.tokenizer)
    with contextlib.nullcontext() if chat is None else contextlib.closing(chat):
        render = None if chat is None else lambda asked: _rendered(chat, asked)
        reader = LineReader(defaults, encode=encode, render=render, end_ids=end_ids, seed=seed)
        template = "" if chat is None else chat.calls
        settings = json.dumps([str(options.checkpoint.resolve()), defaults, seed, config.compute_dtype, template])
        done = run_batch(Engine(opened, config), options.input, options.out, reader=reader, settings=settings)
    lines = f"{done.lines} lines answered in {options.out}, of which {done.broken} were broken and {done.failed} failed"
    answer(options, {"out": str(options.out), **done._asdict()}, [lines])
    return done.status


def _converse(options: argparse.Namespace, fields: dict[str, Any]) -> int:
    """`orogen generate --chat`."""
    if options.json:
        raise ConfigError("--chat with --json; expected one of them")
    from orogen.infer.engine import Engine
    from orogen.infer.terminal import Words, converse

    opened, config = _open(options.checkpoint, options.gin_bindings, rows=1)
    if opened.tokenizer is None:
        raise ConfigError("the checkpoint has no tokenizer.json; expected one, to read what is typed")
    words, chat = opened.tokenizer, _chat(options, opened.tokenizer)
    spoken = Words(words.prompt_ids, end_ids=words.end_ids)
    with contextlib.nullcontext() if chat is None else contextlib.closing(chat):
        if chat is not None:
            _require_installed(SERVE_NEEDS)
            render = lambda asked: chat.prompt(asked).ids  # noqa: E731
            spoken = spoken._replace(render=render, fields={"shown": chat.shown_ids()})
        return converse(Engine(opened, config), spoken, fields, source=sys.stdin, out=sys.stdout)


def _chat(options: argparse.Namespace, words: "Tokenizer | None") -> "Chat | None":
    """The tokenizer with the chat template of the options or else the checkpoint; None without."""
    from orogen.infer.chat import Chat, find_template

    template = None if words is None else find_template(options.checkpoint, words, options.chat_template)
    return None if words is None or template is None else Chat(words, template)


def _rendered(chat: "Chat", asked: Mapping[str, Any]) -> list[int]:
    """The ids of a line's messages. Raises ConfigError."""
    _require_installed(SERVE_NEEDS)
    from orogen.config.json_file import Record, check_form
    from orogen.infer.messages import check_messages
    from orogen.infer.serve.forms import MESSAGES

    check_form(dict(asked), Record({}, MESSAGES), where="it")
    options = asked.get("chat_template_kwargs")
    return chat.prompt(check_messages(asked["messages"]), tools=asked.get("tools"), options=options).ids


def _require_installed(names: Sequence[str]) -> None:
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{', '.join(missing)} not installed; expected what `pip install 'orogen[serve]'` installs")


def _open(
    checkpoint: Path,
    bindings: Sequence[str],
    *,
    rows: int | None = None,
    length: int | None = None,
    settings: dict[str, int] | None = None,
) -> tuple[Any, EngineConfig]:
    """The checkpoint on the plan of the bindings, and the engine's config; see `load_engine`. settings: by name, what
    `length` follows from. Raises ConfigError, also if it cannot fit into the memory."""
    from orogen.checkpoint.open import held_share, open_folder, read_model
    from orogen.config.load import load_engine
    from orogen.simulate.fit import require_inference_fits

    plan, config = load_engine(bindings, rows=rows, length=length)
    with open_folder(checkpoint) as folder:
        causes = settings if settings and config.max_length == length else {}
        share = held_share(folder, config.compute_dtype) if config.weights == IN_FP8 else 1.0
        require_inference_fits(folder.config, plan, config, free_memory(), settings=causes, share=share)
        return read_model(folder, plan, config.compute_dtype, weights=config.weights), config


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


def serve(options: argparse.Namespace, sight: "Callable[[], Sees] | None" = None) -> int:
    """`orogen serve`. sight: opens what answers chats with images, for a model that sees them."""
    _require_installed(SERVE_NEEDS)
    from orogen.config.load import load_engine
    from orogen.infer.constrain import Constraints
    from orogen.infer.engine import Engine
    from orogen.infer.serve.app import make_app
    from orogen.infer.serve.exchange import Settings
    from orogen.infer.serve.run import listen, make_server, run
    from orogen.infer.serve.weights import Weights
    from orogen.infer.service import Service
    from orogen.infer.warm import warm_aloud

    key = os.environ.get(API_KEY) if options.api_key is None else options.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise ConfigError(f"--api_key or {API_KEY} is empty or no plain ASCII; expected a key, or none of both")
    if options.weights is not None and (key is None or not options.weights.is_dir()):
        raise ConfigError(f"--weights {options.weights}; expected a folder that exists, and a key: {API_KEY}")
    chosen = {name: getattr(options, name) for name in ("slots", "max_length", "queue")}
    bindings = [f"EngineConfig.{name} = {value}" for name, value in chosen.items() if value is not None]
    with listen(options.host, options.port) as bound:  # before the model is read, which may take minutes
        opened, config = _open(options.checkpoint, [*options.gin_bindings, *bindings])
        words, chat = opened.tokenizer, _chat(options, opened.tokenizer)
        compiles = words is not None and importlib.util.find_spec("llguidance") is not None
        constraints = Constraints(words, opened.config.vocab_size) if compiles else None
        engine = Engine(opened, config, release=True)
        weights, model = None, opened.config
        if options.weights is not None:
            plan, _ = load_engine([*options.gin_bindings, *bindings])
            weights = Weights(engine, options.weights, model, plan, config)
        del opened  # what it still had of the weights
        warm_aloud(engine)
        sees = None if sight is None else sight()
        service = Service(engine, limit=config.slots + config.queue)
        name = options.name or options.checkpoint.resolve().name
        chosen = {"key": key, "timeout": options.timeout, "priorities": options.priorities}
        settings = Settings(name=name, most=engine.length, **chosen)

        def ready(host: str, port: int) -> None:
            if options.json:
                print(json.dumps({"host": host, "port": port, "model": name}), flush=True)

        beside = {"constraints": constraints, "scheduler": lambda: engine.scheduler, "weights": weights, "sees": sees}
        app = make_app(service, settings, tokenizer=words, chat=chat, **beside)
        with contextlib.closing(engine):
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
        "orogen generate --checkpoint HF_FOLDER --chat --gin_bindings \"EngineConfig.compute_dtype='bfloat16'\"",
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
