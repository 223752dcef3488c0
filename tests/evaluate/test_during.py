"""A run that is evaluated on tasks while it trains."""

from tests.helpers import bound, write_recipe

from orogen.checkpoint.open import open_model
from orogen.cli import main
from orogen.config.engine import EngineConfig
from orogen.config.evaluate import EvaluateConfig
from orogen.evaluate.run import Evaluation
from orogen.evaluate.subject import Subject
from orogen.report.metrics import read_metrics

TASKS = ("induction",)


def test_tasks_are_scored_every_so_many_steps_and_at_the_end(tmp_path, capsys):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    (tmp_path / "text.txt").write_text("a text")
    bindings = bound(
        "TrainConfig.steps = 3", "TrainConfig.evaluate_every = 1", "TrainConfig.sample_tokens = 1",
        "EvaluateConfig.tasks = ('induction',)", "EvaluateConfig.every = 2",
        "EvaluateConfig.lengths = (40,)", "EvaluateConfig.samples = 2",
        f"EvaluateConfig.texts = ({str(tmp_path / 'text.txt')!r},)",
    )  # fmt: skip
    assert main(["train", "--gin_file", str(recipe), "--run", str(run), *bindings]) == 0
    records = {record["step"]: record for record in read_metrics(run)}
    scored = {step: {n: v for n, v in r.items() if n.startswith("evaluate/")} for step, r in records.items()}
    assert [step for step, found in scored.items() if found] == [2, 3]
    assert all("heldout_loss" in record for record in records.values())
    assert scored[2]["evaluate/induction/nats@40"] != scored[3]["evaluate/induction/nats@40"]
    assert "tasks.png" in {file.name for file in run.iterdir()} and "Tasks" in (run / "report.html").read_text()

    text = str(tmp_path / "text.txt")
    config = EvaluateConfig(tasks=TASKS, lengths=(40,), samples=2, texts=(text,))
    after = Evaluation(config).run(Subject(open_model(run), config, EngineConfig()))
    found = {f"evaluate/{task}/{name}": value for task, metrics in after.items() for name, value in metrics.items()}
    assert found.keys() == scored[3].keys()
    assert all(abs(found[name] - value) < 1e-5 * max(1, abs(value)) for name, value in scored[3].items())
    capsys.readouterr()


def test_what_a_run_cannot_evaluate_is_refused(tmp_path, refused):
    recipe = write_recipe(tmp_path)
    for bindings, message in (
        (("EvaluateConfig.tasks = ('mqar',)", "EvaluateConfig.every = 3", "TrainConfig.evaluate_every = 2"),
         "EvaluateConfig.every is 3; expected a multiple of TrainConfig.evaluate_every = 2"),
        (("EvaluateConfig.tasks = ('mqar',)", "DataConfig.heldout_fraction = 0.0"),
         "DataConfig.heldout_fraction is 0.0; expected above 0 with EvaluateConfig"),
        (("EvaluateConfig.tasks = ()",), "EvaluateConfig.tasks is (); expected at least one, or EvaluateConfig.texts"),
        (("EvaluateConfig.tasks = ('needle',)", "PlanConfig.stage = 2", "PlanConfig.microbatches = 2"),
         "PlanConfig.stage is 2; expected 1: an engine has no pipeline"),
    ):  # fmt: skip
        line = refused("train", "--gin_file", recipe, "--run", tmp_path / "run", *bound(*bindings))
        assert line.startswith(message), line
