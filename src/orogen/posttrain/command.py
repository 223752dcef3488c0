"""`orogen sft`, `dpo`, `rl`, `environments`, `distill`, `reward` and `best_of`. Importing this does not import jax."""

import argparse
import contextlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from orogen.command import CHECKPOINT, EXIT_FAILURE, Command, add_config_arguments, answer, free_memory, positive
from orogen.config.checks import ConfigError
from orogen.config.preference import BRADLEY_TERRY
from orogen.config.run import RunConfig
from orogen.config.streams import say
from orogen.infer.options import port
from orogen.train.command import add_train_arguments, require_read, run_task

if TYPE_CHECKING:
    from orogen.checkpoint.folders import Folder
    from orogen.checkpoint.open import Opened
    from orogen.infer.chat import Chat
    from orogen.train.task import Task


def sft(options: argparse.Namespace) -> int:
    """`orogen sft`."""

    def task(config: RunConfig) -> "Task":
        from orogen.posttrain.sft import make_sft

        return make_sft(_of_template(options))

    return run_task(options, task, "chat")


def dpo(options: argparse.Namespace) -> int:
    """`orogen dpo`."""

    def task(config: RunConfig) -> "Task":
        from orogen.posttrain.dpo import make_dpo

        return make_dpo(config, _of_template(options), options.run)

    def adapt(config: RunConfig, origin: "Folder") -> "Folder":
        from orogen.posttrain.reward import with_score

        scores = config.need("preference", "train").preference.loss == BRADLEY_TERRY
        return with_score(origin, seed=config.train.seed) if scores else origin

    return run_task(options, task, "preference", adapt=adapt)


def reward(options: argparse.Namespace) -> int:
    """`orogen reward`."""
    _check_files(options)
    from orogen.checkpoint.open import open_model
    from orogen.config.files import write_atomically
    from orogen.config.load import load_engine
    from orogen.posttrain.chats import conversation_of, places_of, read_lines
    from orogen.posttrain.reward import RewardModel

    conversations = dict(read_lines(options.input, conversation_of))
    plan, engine = load_engine(options.gin_bindings)
    opened = open_model(options.checkpoint, plan, engine.compute_dtype)
    with contextlib.closing(_chat(options.checkpoint, opened, options.chat_template)) as chat:
        rewards = RewardModel(opened, chat, dtype=engine.compute_dtype).score(list(conversations.values()))
    places = places_of(conversations, options.input)
    lines = (json.dumps({**place, "reward": value}) + "\n" for place, value in zip(places, rewards, strict=True))
    write_atomically(options.out, "".join(lines).encode())
    mean = sum(rewards) / max(len(rewards), 1)
    facts = {"out": str(options.out), "conversations": len(rewards), "mean": mean}
    answer(options, facts, [f"{len(rewards)} rewards, {mean:.4f} on average, in {options.out}"])
    return 0


def best_of(options: argparse.Namespace) -> int:
    """`orogen best_of`."""
    _check_files(options)
    from orogen.checkpoint.open import open_folder, open_model, read_model
    from orogen.config.files import write_atomically
    from orogen.config.load import load_engine
    from orogen.infer.engine import Engine
    from orogen.posttrain.best_of import best_of as run
    from orogen.posttrain.best_of import write_best
    from orogen.posttrain.chats import places_of, read_lines
    from orogen.posttrain.pairs import prompt_of
    from orogen.posttrain.reward import RewardModel
    from orogen.simulate.fit import require_inference_fits

    prompts = dict(read_lines(options.input, prompt_of))
    plan, config = load_engine(options.gin_bindings)
    with open_folder(options.checkpoint) as folder, contextlib.ExitStack() as held:
        require_inference_fits(folder.config, plan, config, free_memory(), settings={})
        opened = read_model(folder, plan, config.compute_dtype)
        judge = open_model(options.reward, None if plan is None else plan.evaluating(), config.compute_dtype)
        chat = held.enter_context(contextlib.closing(_chat(options.checkpoint, opened, options.chat_template)))
        judges = held.enter_context(contextlib.closing(_chat(options.reward, judge, None)))
        score = RewardModel(judge, judges, dtype=config.compute_dtype).score
        fields = {"max_tokens": options.tokens, "temperature": options.temperature, "top_p": options.top_p}
        engine = held.enter_context(contextlib.closing(Engine(opened, config)))
        found = run(engine, chat, list(prompts.values()), score, count=options.count, fields=fields, seed=options.seed)
    write_atomically(options.out, write_best(found, places_of(prompts, options.input)))
    failed = sum(one.message is None for one in found)
    facts = {"out": str(options.out), "prompts": len(found), "failed": failed}
    answer(options, facts, [f"{len(found)} prompts answered in {options.out}, of which {failed} failed"])
    return EXIT_FAILURE if failed else 0


def _check_files(options: argparse.Namespace) -> None:
    if not options.out.parent.is_dir() or options.out.is_dir():
        raise ConfigError(f"--out {str(options.out)!r}; expected a file in a folder that exists")


def _chat(folder: Path, opened: "Opened", name: str | None) -> "Chat":
    """The model's tokenizer with its chat template, or that of a name. Raises ConfigError without one."""
    from orogen.infer.chat import Chat, find_template

    if opened.tokenizer is None:
        raise ConfigError(f"{str(folder)!r} has no tokenizer.json; expected one, to read messages with")
    template = find_template(folder, opened.tokenizer, name)
    if template is None:
        raise ConfigError(f"{str(folder)!r} has no chat template; expected one, or --chat_template")
    return Chat(opened.tokenizer, template)


def _add_files(parser: argparse.ArgumentParser, asked: str) -> None:
    bindings = "of PlanConfig and EngineConfig, such as EngineConfig.compute_dtype='bfloat16'; may be repeated"
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help=CHECKPOINT)
    add("--input", type=Path, required=True, metavar="IN.jsonl", help=asked)
    add("--out", type=Path, required=True, metavar="OUT.jsonl", help="gets one line per line of --input with text")
    add("--chat_template", metavar="T", help="a file, or one of ours, in place of the checkpoint's")
    add("--gin_bindings", action="append", default=[], metavar="X.y=1", help=bindings)


def _add_reward_arguments(parser: argparse.ArgumentParser) -> None:
    _add_files(parser, "conversations, as `orogen sft` reads them, whose ends are scored")


def _add_best_of_arguments(parser: argparse.ArgumentParser) -> None:
    _add_files(parser, "prompts: a text or messages, by the name prompt or messages")
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--reward", type=Path, required=True, metavar="DIR", help="the reward model, in such a folder")
    add("--count", type=positive, default=8, metavar="N", help=f"answers per prompt {default}")
    add("--tokens", type=positive, default=512, metavar="N", help=f"most new tokens {default}")
    add("--temperature", type=float, default=1.0, metavar="X", help=f"of sampling {default}")
    add("--top_p", type=float, default=1.0, metavar="X", help=f"likeliest tokens sampled from, by their sum {default}")
    add("--seed", type=int, default=0, metavar="N", help=f"of the answers {default}")


def _of_template(options: argparse.Namespace) -> Path | None:
    """The folder of the model's own chat template. A run that is resumed has kept it; before that its folder says
    nothing about one."""
    return options.run if any(options.run.glob("chat_template.*")) else options.checkpoint


SFT = Command(
    name="sft",
    help="fine-tune a model on conversations",
    examples=(
        "orogen sft --checkpoint HF_FOLDER --gin_file my_chats_and_training.gin --run runs/sft",
        "orogen sft --checkpoint runs/base --gin_file my_chats_and_training.gin --run runs/sft --resume",
    ),
    add_arguments=add_train_arguments,
    run=sft,
    joins=True,
)


def rl(options: argparse.Namespace) -> int:
    """`orogen rl`."""

    with contextlib.ExitStack() as held:

        def task(config: RunConfig) -> "Task":
            from orogen.posttrain.rl import make_rl

            return make_rl(config.rl, options.checkpoint, options.run, held)

        return run_task(options, task, "rl")


def _add_environments_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, "(default: %(default)s)"
    add("action", choices=("serve", "write"), help="a resources server of NeMo Gym; or a data set for Gym's agents")
    add_config_arguments(parser)
    add("--out", type=Path, metavar="OUT.jsonl", help="of write: gets a line per task")
    add("--host", default="127.0.0.1", help=f"of serve: address to listen on {default}")
    add("--port", type=port, default=8001, metavar="P", help=f"of serve: port to listen on; 0: any {default}")


def environments(options: argparse.Namespace) -> int:
    """`orogen environments`."""
    if (options.action == "write") != (options.out is not None):
        raise ConfigError(f"environments {options.action}: expected --out with write, and with write alone")
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{missing[0]} is not installed; expected what `pip install 'orogen[serve]'` installs")
    from orogen.config.load import load
    from orogen.posttrain.environments.running import serve, write_tasks

    rl = load(options.gin_file, options.gin_bindings)[0].need("rl").rl
    if options.action == "serve":
        return serve(rl, options.host, options.port, as_json=options.json)
    tasks = write_tasks(rl, options.out)
    answer(options, {"out": str(options.out), "tasks": tasks}, [f"{tasks:,} tasks in {options.out}"])
    return 0


def _add_distill_arguments(parser: argparse.ArgumentParser) -> None:
    add_train_arguments(parser, checkpoint=f"the teacher: {CHECKPOINT}", needs_run=False)
    student = f"start the student from the weights of {CHECKPOINT}; by default it is new, of the gin files' model"
    parser.add_argument("--student", type=Path, metavar="DIR", help=student)
    written = "train nothing, but write the teacher's DistillConfig.top_k most likely tokens for DistillConfig.logits"
    parser.add_argument("--write_logits", type=Path, metavar="OUT", help=written)


def distill(options: argparse.Namespace) -> int:
    """`orogen distill`."""
    from orogen.checkpoint.open import open_folder

    if (options.run is None) == (options.write_logits is None):
        raise ConfigError("orogen distill has both or neither of --run and --write_logits; expected one of them")
    with contextlib.ExitStack() as held:
        folder = held.enter_context(open_folder(options.checkpoint)) if options.checkpoint is not None else None
        if options.write_logits is not None:
            return _write_logits(options, folder)

        def task(config: RunConfig) -> "Task":
            from orogen.posttrain.distill import Distillation
            from orogen.posttrain.teacher import teacher_plan
            from orogen.simulate.fit import require_distillation_fits

            if folder is None and config.distill.logits is None:
                raise ConfigError("--checkpoint is missing; expected the teacher's, since DistillConfig.logits is None")
            if folder is not None and config.distill.logits is None:
                plan = teacher_plan(config, config.distill)
                require_distillation_fits(config.largest(), folder.config, plan, free_memory())
            made = Distillation(folder, config.distill, run_dir=options.run, student=options.student).task()
            if config.elastic is None:
                return made
            from orogen.compress.elastic import elastic_task

            return elastic_task(made, config, options.run)

        # The run starts from the student; the teacher is the task's.
        of_student = argparse.Namespace(**{**vars(options), "checkpoint": options.student})
        return run_task(of_student, task, "distill", optional=("chat", "elastic"))


def _write_logits(options: argparse.Namespace, folder: "Folder | None") -> int:
    from orogen.config.load import load
    from orogen.config.text import model_bindings
    from orogen.cost.assemble import assemble
    from orogen.parallel import distributed
    from orogen.posttrain.distill import Distillation
    from orogen.posttrain.stored_logits import write_logits
    from orogen.posttrain.teacher import Teacher

    if folder is None:
        raise ConfigError("--checkpoint is missing; expected the teacher's")
    # Of the gin files' model, only the vocabulary would matter: it is the teacher's.
    config, _ = load(options.gin_file, [*options.gin_bindings, *model_bindings(folder.config)])
    config.need("data", "train", "distill")
    require_read(config, ("chat", "distill"))
    more = config.distill.logits is not None or config.distill.states
    if config.distill.top_k is None or more or config.plan.stage > 1:
        raise ConfigError(
            "--write_logits: expected DistillConfig.top_k, no DistillConfig.logits or .states and a plan of one stage"
        )
    if distributed.count() > 1:
        raise ConfigError(f"--write_logits runs on {distributed.count()} processes; expected one")
    made = Distillation(folder, config.distill, run_dir=options.checkpoint, student=options.student)
    corpus = made.open(config, None)
    plan, _ = assemble(config.model, config.plan, length=config.train.sequence_length)
    teacher = Teacher(folder, config, plan, top_k=config.distill.top_k)
    facts = write_logits(teacher, config, corpus, options.write_logits, log=say)
    answer(options, facts, [f"written: {options.write_logits}, {facts['rows']:,} tokens"])
    return 0


DISTILL = Command(
    name="distill",
    help="train a student on what a teacher predicts; under a PrecisionConfig, quantisation-aware",
    examples=(
        "orogen distill --checkpoint runs/teacher --gin_file my_student.gin --run runs/student",
        "orogen distill --checkpoint HF_FOLDER --student pruned --gin_file my_training.gin --run runs/student --resume",
        "orogen distill --checkpoint HF_FOLDER --student HF_FOLDER --gin_file gin_configs/posttrain/qad_nvfp4.gin "
        "--gin_file my_data_and_training.gin --run runs/qad",
        "orogen distill --checkpoint runs/teacher --gin_file my_student.gin --gin_bindings 'DistillConfig.top_k = 64' "
        "--write_logits logits",
    ),
    add_arguments=_add_distill_arguments,
    run=distill,
    joins=True,
)
DPO = Command(
    name="dpo",
    help="train a model on pairs of answers: direct preference optimisation, or a reward model",
    examples=(
        "orogen dpo --checkpoint runs/sft --gin_file gin_configs/posttrain/dpo.gin --run runs/dpo "
        "--gin_bindings \"DataConfig.corpus='pairs'\"",
        "orogen dpo --checkpoint runs/sft --gin_file gin_configs/posttrain/reward.gin --run runs/reward "
        "--gin_bindings \"DataConfig.corpus='pairs'\"",
    ),
    add_arguments=add_train_arguments,
    run=dpo,
    joins=True,
)
REWARD = Command(
    name="reward",
    help="score conversations by a reward model",
    examples=(
        "orogen reward --checkpoint runs/reward --input conversations.jsonl --out rewards.jsonl",
        "orogen reward --checkpoint runs/reward --input conversations.jsonl --out rewards.jsonl "
        "--gin_bindings \"EngineConfig.compute_dtype='bfloat16'\"",
    ),
    add_arguments=_add_reward_arguments,
    run=reward,
)
BEST_OF = Command(
    name="best_of",
    help="answer prompts several times and keep the best answer by a reward model",
    examples=(
        "orogen best_of --checkpoint runs/sft --reward runs/reward --input prompts.jsonl --out best.jsonl --count 16",
        "orogen best_of --checkpoint HF_FOLDER --reward runs/reward --input prompts.jsonl --out best.jsonl --tokens 99",
    ),
    add_arguments=_add_best_of_arguments,
    run=best_of,
)
RL = Command(
    name="rl",
    help="train a model by reinforcement learning on environments",
    examples=(
        "orogen rl --gin_file gin_configs/posttrain/rl_toy.gin --run runs/rl_toy",
        "orogen rl --checkpoint runs/sft --gin_file my_environments_and_training.gin --run runs/rl",
    ),
    add_arguments=add_train_arguments,
    run=rl,
    joins=True,
)
ENVIRONMENTS = Command(
    name="environments",
    help="serve environments of reinforcement learning to NeMo Gym's agents, or write their tasks",
    examples=(
        "orogen environments write --gin_file gin_configs/posttrain/rl_toy.gin --out tasks.jsonl",
        "orogen environments serve --gin_file gin_configs/posttrain/rl_toy.gin --port 8001",
    ),
    add_arguments=_add_environments_arguments,
    run=environments,
)
