"""The runs of a sweep: arms from a matrix, equal budgets, refusals."""

import pytest
from tests.helpers import write_recipe

from orogen.config.checks import ConfigError
from orogen.config.load import load, load_sweep
from orogen.config.text import run_text
from orogen.cost.flops import training_flops_per_token
from orogen.model.count import count
from orogen.sweep.plan import make_arms

STUDY = {
    "SweepConfig.matrix": {
        "width": {"12": [], "24": ["ModelConfig.hidden_size = 24"]},
        "rows": {"4": [], "2": ["TrainConfig.batch_size = 2"], "8": ["TrainConfig.batch_size = 8"]},
    },
    "SweepConfig.control": ("12", "4"),
    "SweepConfig.seeds": (0, 1),
    "TrainConfig.steps": 40,
    "OptimizerConfig.schedule": "wsd",
    "OptimizerConfig.warmup_steps": 8,
    "OptimizerConfig.decay_steps": 16,
}


@pytest.fixture
def study(tmp_path):
    """Makes the arms of the study with some bindings changed."""
    recipe = write_recipe(tmp_path)
    file = tmp_path / "study.gin"

    def make(changes=None, *, also=""):
        lines = (f"{key} = {value!r}" for key, value in {**STUDY, **(changes or {})}.items())
        file.write_text("\n".join([f"include '{recipe.name}'", *lines, also]))
        sweep, _ = load_sweep([file])
        return make_arms(sweep, [file], (), lambda models: [count(model)["total"] for model in models])

    return make


def test_arms_are_the_product_of_the_axes(study):
    names = [arm.name for arm in study().configs]
    assert names == ["12+4", "12+2", "12+8", "24+4", "24+2", "24+8"]


def steps(arms):
    return {arm.name: config.train.steps for arm, config in arms.configs.items()}


def test_equal_tokens_double_the_steps_of_half_the_rows(study):
    assert steps(study()) == {"12+4": 40, "12+2": 80, "12+8": 20, "24+4": 40, "24+2": 80, "24+8": 20}


def test_steps_stay_as_bound_if_they_are_the_budget(study):
    assert set(steps(study({"SweepConfig.budget": "steps"})).values()) == {40}


def test_equal_flops_are_within_half_a_percent(study):
    arms = study({"SweepConfig.budget": "flops", "TrainConfig.steps": 400})
    spent = {}
    for arm, config in arms.configs.items():
        train = config.train
        tokens = train.steps * train.batch_size * train.sequence_length
        spent[arm.name] = tokens * training_flops_per_token(config.model, train.sequence_length)
    assert max(spent.values()) < 1.01 * min(spent.values())
    assert arms.configs[next(a for a in arms.configs if a.name == "24+4")].train.steps < 300


def test_warm_up_and_decay_keep_their_shares(study):
    found = {arm.name: config.optimizer for arm, config in study().configs.items()}
    assert [(found[n].warmup_steps, found[n].decay_steps) for n in ("12+4", "12+2", "12+8")] == [
        (8, 16), (16, 32), (4, 8),
    ]  # fmt: skip


def test_runs_go_seed_by_seed_with_the_chosen_rates(study):
    runs = study().runs({"12+4": 0.25})
    assert [run.name for run in runs[:2]] == ["12+4-seed0", "12+2-seed0"] and len(runs) == 12
    assert runs[0].config.optimizer.learning_rate == 0.25 != runs[1].config.optimizer.learning_rate
    assert [run.config.train.seed for run in runs] == [0] * 6 + [1] * 6
    assert len({run.hash for run in runs}) == 12


def test_a_search_takes_its_share_of_the_steps(study):
    runs = study({"SweepConfig.learning_rates": (0.5, 0.125)}).searches()
    assert [run.name for run in runs[:3]] == ["12+4-lr0.5", "12+4-lr0.125", "12+2-lr0.5"] and len(runs) == 12
    assert [run.config.train.steps for run in runs[:3]] == [10, 10, 20]
    assert runs[0].config.optimizer.warmup_steps == 2 and runs[0].config.train.seed == 10**6


def test_an_arm_begins_with_the_checkpoint_of_its_value_and_seed(study):
    changes = {"SweepConfig.checkpoints": {"24": "runs/wide-{seed}"}, "SweepConfig.learning_rates": (0.5, 0.125)}
    arms, without = study(changes), study()
    runs = {run.name: run for run in arms.runs({})}
    assert runs["24+4-seed1"].checkpoint == "runs/wide-1" and runs["12+4-seed1"].checkpoint is None
    assert {run.checkpoint for run in arms.searches()} == {None, "runs/wide-0"}  # there is none for the search's seed
    before = {run.name: run.hash for run in without.runs({})}
    assert {name for name, run in runs.items() if run.hash != before[name]} == {n for n in runs if n.startswith("24")}


def test_the_text_of_a_run_loads_to_its_config(study, tmp_path):
    run = study().runs({"24+8": 0.5})[-1]
    file = tmp_path / "run.gin"
    file.write_text(run.text)
    assert load([file])[0] == run.config


def test_a_growing_batch_is_refused(study):
    """Its steps differ in tokens."""
    with pytest.raises(ConfigError, match=r"arm 12\+4 has batches of 4 shapes; expected one, without"):
        study({"TrainConfig.batch_ramp": (1, 1, 9)})


def test_the_text_of_a_blend_loads_to_its_config(tmp_path):
    file = tmp_path / "blend.gin"
    file.write_text(
        "DataConfig.sources = [@a/SourceConfig(), @b/SourceConfig()]\nDataConfig.tokenizer = 'byte'\n"
        "a/SourceConfig.name = 'a'\na/SourceConfig.corpus = 'stdlib'\na/SourceConfig.weight = 0.75\n"
        "b/SourceConfig.name = 'b'\nb/SourceConfig.corpus = 'texts'\nb/SourceConfig.weight = 0.25\n"
        "TrainConfig.phases = [@late/PhaseConfig()]\nlate/PhaseConfig.after = 3\nlate/PhaseConfig.batch_size = 2\n"
        "TrainConfig.steps = 5\nTrainConfig.batch_size = 4\nTrainConfig.sequence_length = 8\nTrainConfig.seed = 1\n"
    )
    config = load([file])[0]
    again = tmp_path / "again.gin"
    again.write_text(run_text(config))
    assert load([again])[0] == config


PHASED = (
    "TrainConfig.phases = [@late/PhaseConfig()]\nlate/PhaseConfig.after = 30\n"
    "DataConfig.corpus = None\nDataConfig.sources = [@a/SourceConfig(), @b/SourceConfig()]\n"
    "a/SourceConfig.name = 'a'\na/SourceConfig.corpus = 'stdlib'\na/SourceConfig.weight = 1.0\n"
    "b/SourceConfig.name = 'b'\nb/SourceConfig.corpus = 'stdlib'\nb/SourceConfig.weight = 1.0\n"
)


def test_phases_keep_their_shares_of_the_steps(study):
    """A phase that changes the blend costs what the others do; one that changes the shape is refused."""
    arms = study(also=PHASED + "late/PhaseConfig.weights = {'b': 1.0}\n")
    found = {arm.name: [(p.after, p.weights) for p in config.train.phases] for arm, config in arms.configs.items()}
    assert [found[name] for name in ("12+4", "12+2", "24+8")] == [[(n, {"b": 1.0})] for n in (30, 60, 15)]
    with pytest.raises(ConfigError, match=r"arm 12\+4 has batches of 2 shapes; expected one"):
        study(also=PHASED + "late/PhaseConfig.sequence_length = 8\n")
    with pytest.raises(ConfigError, match=r"arm 12\+4 has PhaseConfig.learning_rate 0.5; expected none: SweepConfig"):
        study({"SweepConfig.learning_rates": (1.0, 2.0)}, also=PHASED + "late/PhaseConfig.learning_rate = 0.5\n")


ONE = {"SweepConfig.control": ("b",)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SweepConfig.parameters_within": 0.05}, "arm 24+4 has .* parameters; expected the control's"),
        ({"TrainConfig.steps": 41}, r"arm 12\+8 spends 192 tokens per step; .* 3936, but 20 steps spend 3840"),
        ({"SweepConfig.control": ("12", "5")}, "SweepConfig.control is .*one value for each of the axes width, rows"),
        ({"SweepConfig.control": ("12",)}, "one value for each of the axes width, rows"),
        ({"SweepConfig.matrix": {}}, "SweepConfig.matrix is {}; expected"),
        ({"SweepConfig.matrix": {"a": {"../b": []}}}, "SweepConfig.matrix is"),
        ({"SweepConfig.further": ("whole_heldout_loss",)}, "SweepConfig.further is .*other names than the metric's"),
        ({"SweepConfig.checkpoints": {"13": "a"}}, "SweepConfig.checkpoints is .*values among .'12', '2', '24'"),
        ({"SweepConfig.checkpoints": {"12": ""}}, "SweepConfig.checkpoints is"),
        ({"SweepConfig.checkpoints": {"12": "a", "4": "b"}}, r"at most one for the values of arm 12\+4"),
        ({"SweepConfig.seeds": (1, 1)}, "SweepConfig.seeds is .*different numbers"),
        ({"SweepConfig.seeds": (10**6,)}, "SweepConfig.search_seed is 1000000"),
        ({"SweepConfig.learning_rates": (0.1,)}, "SweepConfig.learning_rates is .*at least two"),
        ({"SweepConfig.matrix": {"a": {"b": ["ModelConfig.wrong = 1"]}}, **ONE}, "arm b: .*wrong"),
        ({"SweepConfig.matrix": {"a": {"b": ["ModelConfig.mtp_loss_scale = 0.5"]}}, **ONE}, "arm b: .*mtp_loss_scale"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(study, changes, message):
    with pytest.raises(ConfigError, match=message.replace("24+4", r"24\+4")):
        study(changes)
