"""`orogen caption`, `orogen database` and `orogen graft`; and what `orogen generate` and `orogen serve` do with images.
Importing this does not import jax."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orogen.command import CHECKPOINT, Command, add_config_arguments, answer, free_memory, positive
from orogen.config.checks import ConfigError
from orogen.infer import command as infer
from orogen.infer.options import add_request_options

if TYPE_CHECKING:
    from orogen.infer.sight import Seen
    from orogen.vision.answers import Sight
    from orogen.vision.encoder import Encoder

PAIRS = "images with captions: .jsonl, .parquet or WebDataset .tar, a file or a folder (orogen.data.interleaved)"
ENCODER = "the Hugging Face folder of a CLIP or SigLIP model, or efficientnet_lite0[/PIXELS]"


def _add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the run folder of a captioner")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="repeatable")
    parser.add_argument("--input", type=Path, metavar="CORPUS", help=f"{PAIRS}, whose captions are scored against")
    parser.add_argument("--database", type=Path, metavar="DIR", help="what `orogen database` has built")
    parser.add_argument("--encoder", metavar="E", help=f"{ENCODER}; by default the one of the run")
    parser.add_argument("--retrieved", type=_count, metavar="K", help="captions to retrieve; by default as in the run")
    parser.add_argument("--guard", type=_cosine, metavar="COSINE", help="leave out entries of at least this similarity")
    parser.add_argument(
        "--shots", type=_count, metavar="N", help="similar pairs before an image; by default as in the run"
    )
    parser.add_argument("--examples", type=Path, metavar="CORPUS", help="where the pairs of --shots come from")
    parser.add_argument("--features", type=Path, metavar="DIR", help="keeps the features of --examples for later calls")
    parser.add_argument("--tokens", type=positive, default=64, metavar="N", help="most tokens of a caption")
    parser.add_argument("--page", type=Path, metavar="F.html", help="write images, captions and what was retrieved")


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number")
    return int(text)


def _cosine(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a cosine, from -1 to 1")
    return value


def _add_database_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("build", "add", "remove", "show"), help="what to do with the database")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the database's folder")
    parser.add_argument("--input", type=Path, metavar="CORPUS", help=f"for build and add: {PAIRS}")
    parser.add_argument("--encoder", metavar="E", help=f"for build and add: {ENCODER}")
    parser.add_argument("--index", choices=("flat", "ivf", "hnsw"),
                        help="for build: flat searches exactly; ivf and hnsw are faster, by faiss; by default flat, or "
                             "ivf for more entries than an exact search finds within 5 ms")  # fmt: skip
    parser.add_argument("--ids", type=_ids, metavar="1,2", help="for remove: the entries' ids")


def _ids(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; expected whole numbers separated by commas")
    return [int(part) for part in parts]


def _add_graft_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help=f"the model: {CHECKPOINT}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, for the new model")
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="seeds the new parameters")


def caption(options: argparse.Namespace) -> int:
    """`orogen caption`."""
    from orogen.vision.run import Settings, caption_images, read_seen

    if bool(options.image) == (options.input is not None):
        raise ConfigError("caption has both or neither of --image and --input; expected one of them")
    seen = read_seen(options.checkpoint)
    k = seen.retrieved if options.retrieved is None else options.retrieved
    if k and options.database is None:
        raise ConfigError(f"the model was trained with {k} retrieved captions; expected --database, or --retrieved 0")
    shots = seen.shots if options.shots is None else options.shots
    if shots and options.examples is None:
        raise ConfigError(f"the captions have {shots} examples each; expected --examples, or --shots 0")
    settings = Settings(
        options.checkpoint, options.encoder or seen.encoder, options.database, k, options.guard, options.tokens,
        shots, options.examples, options.features,
    )  # fmt: skip
    found = caption_images(settings, seen, options.image, options.input)
    if options.page is not None:
        from orogen.vision.page import write_page

        write_page(found, options.page)
    facts = found.facts()
    answer(options, facts, found.lines())
    return 0


def _add_sight_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("of a model that sees images (`orogen.vision`)").add_argument
    add("--database", type=Path, metavar="DIR", help="of captions, which `orogen database` has built")
    add("--retrieved", type=_count, metavar="K", help="captions to retrieve for an image; by default as in the run")


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    infer.GENERATE.add_arguments(parser)
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE",
                        help="comes before --prompt; repeatable. The answer is the likeliest tokens")  # fmt: skip
    _add_sight_arguments(parser)


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    infer.SERVE.add_arguments(parser)
    _add_sight_arguments(parser)


def generate(options: argparse.Namespace) -> int:
    """`orogen generate`, with images or without."""
    if not options.image:
        _refuse_sight(options, "--image")
        return infer.generate(options)
    _refuse_unread(options)
    from orogen.data.interleaved import read_image
    from orogen.infer.sight import TOKENS

    said: list[str | bytes] = [read_image(file, f"image {str(file)!r}") for file in options.image]
    said += [options.prompt] if options.prompt else []
    seen = _sight(options)(said, options.tokens or TOKENS)
    facts = {"images": [str(file) for file in options.image], "prompt": options.prompt or "", "text": seen.text,
             "finish": "stop" if seen.ended else "length", "retrieved": seen.retrieved}  # fmt: skip
    hits = [f"    {hit['score']:.3f}  {hit['caption']}  ({hit['source']})" for hit in seen.retrieved]
    answer(options, facts, [seen.text, *hits])
    return 0


def _refuse_unread(options: argparse.Namespace) -> None:
    """Raises ConfigError for an option of `orogen generate` that an answer to images would not follow."""
    others = ("chat", "input", "out", "chat_template", "gin_bindings")
    if given := [name for name in others if getattr(options, name)]:
        raise ConfigError(f"--image with --{given[0]}; expected --image with --prompt alone")
    asked = argparse.ArgumentParser()
    add_request_options(asked)
    for name, default in vars(asked.parse_args([])).items():
        value = getattr(options, name)
        if value != default and (name, value) != ("temperature", 0):
            raise ConfigError(f"--{name} {value}; expected none with --image, whose answer is the likeliest tokens")


def serve(options: argparse.Namespace) -> int:
    """`orogen serve`, which also answers chats with images if the model is a captioner. One that was trained with
    retrieved captions answers texts alone if it is given no database."""
    from orogen.vision.captioning import SEEN
    from orogen.vision.run import read_seen

    if not (options.checkpoint / SEEN).is_file():
        _refuse_sight(options, "a captioner's --checkpoint")
        return infer.serve(options)
    retrieved = read_seen(options.checkpoint).retrieved
    if retrieved and options.database is None and options.retrieved is None:

        def refuse(_: object, __: int) -> "Seen":
            raise ConfigError(
                f"a message has an image; expected texts alone: the model was trained with {retrieved} retrieved "
                "captions, and the server has neither --database nor --retrieved 0"
            )

        return infer.serve(options, lambda: refuse)
    sight = _sight(options)  # what is wrong with it is told before an engine is made
    return infer.serve(options, sight.open)


def _sight(options: argparse.Namespace) -> "Sight":
    from orogen.vision.answers import Sight

    return Sight(options.checkpoint, options.database, options.retrieved)


def _refuse_sight(options: argparse.Namespace, expected: str) -> None:
    if options.database is not None or options.retrieved is not None:
        raise ConfigError(f"--database or --retrieved; expected them with {expected} alone")


def database(options: argparse.Namespace) -> int:
    """`orogen database`."""
    from orogen.vision import database as databases

    if options.action in ("build", "add"):
        if options.input is None or options.encoder is None:
            raise ConfigError(f"database {options.action} lacks --input or --encoder; expected both")
        encoder, told, facts = _changed(options)
        lines = [f"{facts.entries:,} entries of encoder {encoder.name} in {options.folder}"]
        lines += [f"left out: {key}: {why}" for key, why in told.items()]
        answer(options, {**vars(facts), "left_out": told}, lines)
        return 0
    if options.action == "remove":
        if not options.ids:
            raise ConfigError("database remove lacks --ids; expected some, as `orogen database show` lists them")
        facts = databases.remove(options.folder, options.ids)
        lines = [f"{facts.entries:,} entries in {options.folder}"]
        if facts.index == "hnsw":
            lines.append("its HNSW index was built anew from these: faiss takes nothing out of one")
        answer(options, vars(facts), lines)
        return 0
    found = databases.Database(options.folder)
    entries = [{"id": int(i), **entry._asdict()} for i, entry in zip(found.id_n, found.entries(), strict=True)]
    lines = [f"{one['id']:>8}  {one['caption']}  ({one['source']})" for one in entries]
    answer(options, {**vars(found.facts), "items": entries}, lines)
    return 0


def _changed(options: argparse.Namespace) -> "tuple[Encoder, dict[str, str], Any]":
    from orogen.vision import database as databases
    from orogen.vision.encoder import open_encoder
    from orogen.vision.run import read_entries

    encoder = open_encoder(options.encoder)
    if options.action == "add":
        databases.Database(options.folder, encoder)  # refused before hours of encoding
    else:
        databases.check_new(options.folder, options.index or databases.IVF)  # whose library it may need
    entries, embedding_ne, told = read_entries(options.input, encoder)
    if options.action == "build":
        index = options.index or databases.default_index(len(entries))
        return encoder, told, databases.create(options.folder, encoder, embedding_ne, entries, index=index)
    return encoder, told, databases.add(options.folder, encoder, embedding_ne, entries)


def graft(options: argparse.Namespace) -> int:
    """`orogen graft`."""
    from orogen.checkpoint.open import open_folder
    from orogen.compress.rewrite import Source, rewrite
    from orogen.config.load import load_part
    from orogen.config.model import ModelConfig
    from orogen.model.count import count
    from orogen.simulate.fit import require_conversion_fits
    from orogen.vision.graft import Grafted, check_graft

    config, memory = load_part(ModelConfig, options.gin_file, options.gin_bindings), free_memory()
    with open_folder(options.checkpoint) as folder:
        check_graft(folder.config, config)
        source = Source(folder)
        fits = lambda tensor, held: require_conversion_fits(memory, tensor=tensor, held=held)  # noqa: E731
        rewrite(source, Grafted(source, config, options.seed), config, options.checkpoint, options.out, fits=fits)
    facts = count(config)
    answer(options, {"target": str(options.out), **facts}, [f"written: {options.out}, {facts['total']:,} parameters"])
    return 0


CAPTION = Command(
    name="caption",
    help="caption images with a trained model and a database of captions",
    examples=(
        "orogen caption --checkpoint runs/captioner --database captions --image photo.jpg",
        "orogen caption --checkpoint runs/captioner --database captions --input test.tar --page captions.html --json",
    ),
    add_arguments=_add_caption_arguments,
    run=caption,
)
DATABASE = Command(
    name="database",
    help="build, extend, reduce or show a database of captions by image",
    examples=(
        "orogen database build captions --input pairs.tar --encoder CLIP_FOLDER --index hnsw",
        "orogen database add captions --input more.parquet --encoder CLIP_FOLDER",
        "orogen database remove captions --ids 3,17",
    ),
    add_arguments=_add_database_arguments,
    run=database,
)
GRAFT = Command(
    name="graft",
    help="insert layers that see images into a language model; it computes what it did until they are trained",
    examples=(
        "orogen graft --checkpoint runs/text --gin_file my_captioner.gin --out grafted",
        "orogen graft --checkpoint HF_FOLDER --gin_file my_captioner.gin --out grafted --seed 1 --json",
    ),
    add_arguments=_add_graft_arguments,
    run=graft,
)
GENERATE = infer.GENERATE._replace(
    examples=(
        *infer.GENERATE.examples,
        "orogen generate --checkpoint runs/captioner --database captions --image a.jpg",
    ),
    add_arguments=_add_generate_arguments,
    run=generate,
)
SERVE = infer.SERVE._replace(
    examples=(*infer.SERVE.examples, "orogen serve --checkpoint runs/captioner --database captions"),
    add_arguments=_add_serve_arguments,
    run=serve,
)
