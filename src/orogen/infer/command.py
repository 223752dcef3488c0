"""`orogen generate` and `orogen score`. Importing this does not import jax."""

import argparse
import json
import math
from pathlib import Path

from orogen.command import CHECKPOINT, Command, answer, free_memory, positive
from orogen.config.checks import ConfigError, is_unicode
from orogen.config.plan import PlanConfig

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
