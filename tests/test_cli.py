"""The command line: what it answers, and that bad input ends with status 2, one line, and nothing changed."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers import MODEL, bound, write_recipe

from orogen.cli import COMMANDS, FIRST, main, make_parser
from orogen.config.run import PARTS

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ", ".join(kind.__name__ for kind in PARTS.values())


@pytest.fixture
def recipe(tmp_path) -> Path:
    return write_recipe(tmp_path)


# Answers


def test_params_prints_one_json_object(recipe, capsys):
    assert main(["params", "--gin_file", str(recipe), "--json"]) == 0
    out, err = capsys.readouterr()
    # embedding and head 259x12 each; query and out 12x30, key and value 12x10; mlp 12x14 twice; three norms of 12
    total = 2 * 259 * 12 + 2 * 12 * 30 + 2 * 12 * 10 + 2 * 12 * 14 + 3 * 12
    # embedding, final norm, head; a norm, query, key, value and out; a norm, up and down
    assert json.loads(out) == {
        "total": total, "active": total, "active_without_embedding": total - 259 * 12, "mtp": 0, "tensors": 3 + 5 + 3,
        "bytes": 2 * total,
    }  # fmt: skip
    assert out.count("\n") == 1 and err == ""


def test_params_for_a_person_has_one_line_per_count(recipe, capsys):
    assert main(["params", "--gin_file", str(recipe)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "total", "active", "active_without_embedding", "mtp", "tensors", "bytes",
    ]  # fmt: skip
    assert lines[0].split()[1] == "7,548"


def test_plan_needs_no_devices(recipe, capsys):
    bindings = bound("PlanConfig.data = 24", "PlanConfig.tensor = 2", "ModelConfig.vocab_size = 260")
    bindings += bound("TrainConfig.batch_size = 24", "PlanConfig.fsdp = 'none'")
    assert main(["plan", "--gin_file", str(recipe), "--json", *bindings]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["devices"] == 48 and facts["mesh"] == {"data": 24, "tensor": 2}
    assert facts["parameters"]["backbone.children.0.mixer.value"]["device_shape"] == [12, 5]


def test_plan_for_a_person_is_a_table(recipe, capsys):
    assert main(["plan", "--gin_file", str(recipe)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mesh: data 1 (1 devices)"
    assert any(line.split() == ["head.weight", "12x259", "embed", "vocab", "12x259", "12x259"] for line in lines)


def test_plan_tells_what_is_sent(recipe, capsys):
    bindings = bound("PlanConfig.data = 2", "TrainConfig.batch_size = 4", "PlanConfig.fsdp = 'none'")
    assert main(["plan", "--gin_file", str(recipe), "--json", *bindings, "--compile", "--fake_devices", "8"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (up_down,) = (r for r in facts["collectives"]["units"]["-"] if r["part"] == "gradients")
    assert up_down["axes"] == ["data"] and up_down["bytes"] == (2 * 12 * 14 + 12) * 4
    assert facts["flops_overhead"] == 0
    for collectives in facts["compiled"].values():
        assert collectives and all(row["analytic"] == row["compiled"] for row in collectives)


def test_several_gin_files_are_read_in_order(recipe, tmp_path, capsys):
    wider = tmp_path / "wider.gin"
    wider.write_text("ModelConfig.intermediate_size = 28\n")
    assert main(["params", "--gin_file", str(recipe), "--gin_file", str(wider), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == 7548 + 2 * 12 * 14


# Refusals of a config


def test_missing_gin_file(refused, tmp_path):
    file = tmp_path / "none.gin"
    assert refused("params", "--gin_file", file) == f"gin file {str(file)!r} does not exist"


REFUSED = {
    "unknown letter": (
        "ModelConfig.pattern = '*Q-'",
        "ModelConfig.pattern is '*Q-': unknown letter 'Q'; expected M (Mamba-2), m (Mamba-1), * (attention), "
        "w (sliding-window attention), + (multi-head latent attention), - (dense MLP), E (mixture of experts), "
        "x (gated cross-attention), g (tanh-gated MLP), | or /",
    ),
    "misspelt field": (
        "ModelConfig.num_heads = 3",
        "gin: Configurable 'ModelConfig' doesn't have a parameter named 'num_heads'.",
    ),
    "misspelt macro": (
        "STPES = 3",
        f"bindings that nothing read: STPES; expected fields of {CLASSES}",
    ),
    "misspelt scope": (
        "vaild/DataConfig.seed = 3",
        f"bindings that nothing read: vaild/DataConfig.seed; expected fields of {CLASSES}",
    ),
    "batch": (
        "PlanConfig.data = 3",
        "TrainConfig.batch_size is 4; expected a multiple of data x microbatches = 3 x 1",
    ),
    "pipeline": (
        "PlanConfig.schedule = '2f2b'",
        "PlanConfig.schedule is '2f2b'; expected one of gpipe, 1f1b, eager_1f1b, interleaved",
    ),
    "no quotes": (
        "PlanConfig.fsdp = parameters",
        "gin: cannot read the value parameters; expected a number, a quoted string, True, False, None or a list",
    ),
}


@pytest.mark.parametrize(("binding", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("task", ["train", "params", "plan", "verify"])
def test_every_task_refuses_a_bad_config(refused, recipe, tmp_path, task, binding, message):
    run = ["--run", tmp_path / "run"] if task == "train" else []
    assert refused(task, "--gin_file", recipe, *run, *bound(binding)) == message


def test_heads_that_tensor_does_not_divide(refused, recipe):
    bindings = bound("PlanConfig.tensor = 4", "ModelConfig.vocab_size = 260")
    expected = "expected a multiple of PlanConfig.tensor = 4 (nearest legal tensor: 2, 1)"
    assert refused("plan", "--gin_file", recipe, *bindings) == f"ModelConfig.num_attention_heads is 6; {expected}"


def test_experts_that_do_not_fold(refused, recipe):
    plan = bound("PlanConfig.data = 4", "PlanConfig.expert = 3")
    experts = ("pattern = '*-E'", "n_routed_experts = 12", "num_experts_per_tok = 2", "moe_intermediate_size = 4")
    message = refused("plan", "--gin_file", recipe, *plan, *bound(*(f"ModelConfig.{field}" for field in experts)))
    assert message.startswith(
        "PlanConfig: expert 3 x expert_tensor 1 does not divide the 4 devices of a stage (data 4)"
    )
    assert "nearest legal: expert 4 x expert_tensor 1" in message


@pytest.mark.parametrize("task", ["params", "plan", "verify", "train"])
def test_every_task_refuses_a_plan_for_experts_of_a_model_without_any(refused, recipe, task, tmp_path):
    run = ("--run", tmp_path / "run") if task == "train" else ()
    message = refused(task, "--gin_file", recipe, *run, *bound("PlanConfig.data = 4", "PlanConfig.expert = 2"))
    reason = "nothing reads it: the model has no layers of mixture of experts (E)"
    assert message == f"PlanConfig.expert is 2; expected 1, since {reason}"


HUGE = ("TrainConfig.batch_size = 99999999996", "ModelConfig.vocab_size = 99999999998")


@pytest.mark.parametrize("binding", HUGE)
@pytest.mark.parametrize("task", ["verify", "train"])
def test_sizes_beyond_the_memory_are_refused_before_anything_is_built(refused, recipe, task, binding, tmp_path):
    run = tmp_path / "run"
    options = ("--run", run) if task == "train" else ()
    message = refused(task, "--gin_file", recipe, *options, *bound(binding))
    name, value = binding.split(" = ")
    assert message.startswith(f"{name} is {value}; expected less: ") and not run.exists()


def test_a_config_without_a_model(refused, tmp_path):
    file = tmp_path / "plan.gin"
    file.write_text("PlanConfig.data = 2\n")
    assert (
        refused("params", "--gin_file", file)
        == "the gin files have no bindings of ModelConfig; expected some, with its fields"
    )


def test_training_without_data(refused, tmp_path):
    file = tmp_path / "model.gin"
    file.write_text(MODEL)
    message = "the gin files have no bindings of DataConfig; expected some, with its fields"
    assert refused("train", "--gin_file", file, "--run", tmp_path / "run") == message


# What argparse refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: TASK"),
        (["trian"], "argument TASK: invalid choice: 'trian'"),
        (["params"], "the following arguments are required: --gin_file"),
        (["train", "--gin_file", "a.gin"], "the following arguments are required: --run"),
        (["generate"], "the following arguments are required: --checkpoint"),
        (
            ["generate", "--checkpoint", "a", "--tokens", "0"],
            "--tokens/--max_tokens: '0'; expected a whole number above 0",
        ),
        (
            ["generate", "--checkpoint", "a", "--tokens", "1.5"],
            "--tokens/--max_tokens: '1.5'; expected a whole number above 0",
        ),
        (["generate", "--checkpoint", "a", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["plan", "--gin_file", "a", "--fake_devices", "-2"], "--fake_devices: '-2'; expected a whole number above 0"),
        (["plan", "--gin_file", "a", "--jsn"], "unrecognized arguments: --jsn"),
    ],
)
def test_bad_options_end_with_status_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1] and "Traceback" not in err


def test_help_names_every_task(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(task in out for task in ("train", "params", "plan", "verify", "generate"))
    assert "examples:\n" + "".join(f"  {example}\n" for example in FIRST) in out and len(FIRST) >= 2


def test_help_imports_nothing_slow():
    code = "import sys; from orogen.cli import make_parser; make_parser().format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "argparse" in loaded and not {"jax", "flax", "numpy", "gin", "argcomplete", "tokenizers"} & set(loaded)


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert capsys.readouterr().out == f"orogen {version}\n"


EXAMPLES = [(command, example) for command in COMMANDS for example in command.examples]


@pytest.mark.parametrize(("command", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_examples_of_the_help_are_commands(command, example):
    program, *arguments = shlex.split(example)
    assert program == "orogen" and make_parser().parse_args(arguments).run_task is command.run
    assert all((ROOT / word).is_file() for word in arguments if word.startswith("gin_configs/"))


@pytest.mark.parametrize("command", COMMANDS, ids=[command.name for command in COMMANDS])
def test_help_of_a_task_has_its_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command.name, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and len(command.examples) >= 2
    assert out.endswith("examples:\n" + "".join(f"  {example}\n" for example in command.examples))


@pytest.mark.parametrize(
    ("line", "words"),
    [("orogen ver", ["verify"]), ("orogen verify --what ", ["gradients", "step", "evaluation"])],
)
def test_the_shell_completes(line, words, tmp_path):
    """By argcomplete's protocol: what may come next goes to a file, in place of file descriptor 8."""
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words"),
        "_ARGCOMPLETE_SHELL": "bash", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
    }  # fmt: skip
    ended = subprocess.run([sys.executable, "-m", "orogen.cli"], env={**os.environ, **asked}, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()
    assert [word.strip() for word in (tmp_path / "words").read_text().splitlines()] == words


def test_the_quickstarts_parameters_are_counted(capsys):
    recipe = ROOT / "gin_configs" / "recipes" / "quickstart.gin"
    assert main(["params", "--gin_file", str(recipe), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["active_without_embedding"] < facts["active"] < facts["total"] and facts["mtp"] > 0
