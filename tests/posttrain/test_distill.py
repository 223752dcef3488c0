"""Distillation: its loss and gradient under plans of student and teacher against all logits at once, and whole runs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.helpers import RUN, hybrid, run_config, several_devices

from orogen.checkpoint.open import open_folder, open_model
from orogen.cli import main
from orogen.config.distill import DistillConfig
from orogen.config.load import load
from orogen.config.plan import PlanConfig
from orogen.config.precision import PrecisionConfig
from orogen.config.run import RunConfig
from orogen.config.text import run_text
from orogen.cost.assemble import assemble
from orogen.layers.documents import Documents, numbered
from orogen.model.count import count
from orogen.model.lm import build, initial_state
from orogen.parallel import placement
from orogen.parallel.plan import single_device_plan
from orogen.parallel.rounding_state import NUMBER
from orogen.posttrain.distill import DISTILLATION, DIVERGENCE, Distillation, make_objective
from orogen.posttrain.states import check_states
from orogen.posttrain.teacher import HIDDEN, IDS, Teacher, teacher_plan
from orogen.precision.words import step_key
from orogen.report.metrics import read_metrics
from orogen.simulate.fit import Memory, require_distillation_fits
from orogen.train.formats import in_formats
from orogen.train.pretraining import PRETRAINING
from orogen.train.run import _open_corpus
from orogen.train.sides import packed_batches
from orogen.train.step import batch_to_devices, gradients

# Odd, so that ranks of tensor pad the vocabulary. The teacher has other widths and another depth.
STUDENT = hybrid(pattern="M*", vocab_size=97, mtp_depths=0)
TEACHER = hybrid(pattern="*-M", vocab_size=97, mtp_depths=0, hidden_size=36, intermediate_size=40)
NARROW = dataclasses.replace(STUDENT, hidden_size=20)
CHANNELS = [31, 4, 0, 17, 9, 35, 22, 8, 13, 2, 28, 11, 5, 33, 19, 1, 24, 16, 7, 30]  # of the teacher, in NARROW
FORWARD_ONLY = {"keep": tuple(f"{kind}.{role}:plain" for kind in ("mamba", "attention")
                              for role in ("input_gradient", "weight_gradient"))}  # fmt: skip
QAD = PrecisionConfig(recipe="fp8_tensorwise", **FORWARD_ONLY)
SEED = 5


class InMemory:
    """A folder with a model that was never saved: initial parameters, those of matrices larger, so that its
    distribution is far from uniform."""

    plan, masters = None, False

    def __init__(self, config):
        self.config = config

    def state(self):
        params, buffers = initial_state(self.config, SEED)
        return jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params), buffers

    def read(self, built, plan, dtype):
        placed = tuple(built.laid(part) for part in self.state())
        return jax.device_put(placed, placement.shardings((built.params, built.buffers), plan))


def logits(config, state, batch, precision=None):
    """(b, t, v) float32, of one device."""
    plan = single_device_plan(PlanConfig(), config)
    if precision is not None:
        plan = in_formats(plan, precision, config).in_step(step_key(0, 0), batch.tokens_bt)
        number_bt = jnp.arange(batch.tokens_bt.size, dtype=jnp.int32).reshape(batch.tokens_bt.shape)
        plan = plan.on_tokens({NUMBER: number_bt})
    docs = Documents(jnp.asarray(numbered(batch.segments_bt)), jnp.asarray(batch.positions_bt))
    return nnx.merge(build(config).graph, *state).logits(jnp.asarray(batch.tokens_bt), docs, plan)


def after_layers(config, state, batch):
    """The residual stream after each layer, applied one by one."""
    plan, model = single_device_plan(PlanConfig(), config), nnx.merge(build(config).graph, *state)
    docs = Documents(jnp.asarray(numbered(batch.segments_bt)), jnp.asarray(batch.positions_bt))
    x_btd, found = model.embedding(jnp.asarray(batch.tokens_bt), docs, plan), []
    for number, layer in enumerate(model.backbone.children):
        x_btd, _ = layer(x_btd, docs, plan.of_layers(number, number + 1).of_layer())
        found.append(x_btd)
    return found


def apart(distill, students, teachers):
    """(b, t): the mean comparison of the pairs of layers."""
    found = []
    for one, other in distill.state_pairs:
        s_btd, t_btd = students[one], teachers[other][..., np.array(CHANNELS)]
        inner = jnp.sum(s_btd * t_btd, -1) / jnp.linalg.norm(s_btd, axis=-1) / jnp.linalg.norm(t_btd, axis=-1)
        found.append(1 - inner if distill.state_loss == "cosine" else jnp.mean((s_btd - t_btd) ** 2, -1))
    return sum(found) / len(found)


def expected(config: RunConfig, batch):
    """Loss and gradients of the whole student, from both models' logits."""
    student, distill, t = initial_state(config.model, config.train.seed), config.distill, config.distill.temperature
    segments_bt, weights_bt = batch.segments_bt, np.roll(batch.weights_bt, -1, 1)
    weights_bt = np.where((np.roll(segments_bt, -1, 1) == segments_bt) & (segments_bt > 0), weights_bt, 0)
    weights_bt[:, -1] = 0
    known_btv = logits(TEACHER, InMemory(TEACHER).state(), batch)
    teachers = after_layers(TEACHER, InMemory(TEACHER).state(), batch)
    precision = config.precision if config.precision.rounds else None

    def loss(params):
        z_btv, p_btv = logits(config.model, (params, student[1]), batch, precision), known_btv
        nats_bt = -jnp.take_along_axis(jax.nn.log_softmax(z_btv), np.roll(batch.tokens_bt, -1, 1)[..., None], 2)[..., 0]
        if distill.top_k is not None:
            _, ids = jax.lax.top_k(p_btv, distill.top_k)
            z_btv, p_btv = (jnp.take_along_axis(x, ids, 2) for x in (z_btv, p_btv))
        p_btv, q_btv = (jax.nn.log_softmax(x / t) for x in (p_btv, z_btv))
        loss_bt = distill.divergence * jnp.sum(jnp.exp(p_btv) * (p_btv - q_btv), -1) + distill.cross_entropy * nats_bt
        if distill.states:
            students = after_layers(config.model, (params, student[1]), batch)
            loss_bt += distill.state_weight * apart(distill, students, teachers)
        return jnp.sum(weights_bt * loss_bt) / weights_bt.sum()

    return jax.jit(jax.value_and_grad(loss))(student[0])


CASES = {
    "tensor and context, teacher on data": (
        {"tensor": 2, "context": 2, "fsdp": "optimizer"},
        {"divergence": 1.0, "teacher_plan": PlanConfig(data=4, fsdp="parameters")},
        {},
    ),
    "stages, the most likely": (
        {"data": 2, "stage": 2, "microbatches": 2, "shift": "alltoall"},
        {"divergence": 0.5, "cross_entropy": 0.25, "temperature": 2.0, "top_k": 7},
        {},
    ),
    "hidden states by cosine under sequence parallelism": (
        {"tensor": 2, "context": 2, "microbatches": 2},
        {
            "divergence": 1.0,
            "states": ("0:0", "1:2"),
            "state_weight": 3.0,
            "top_k": 7,
            "teacher_plan": PlanConfig(data=2, tensor=2),
        },
        {},
    ),
    "hidden states by squares": (
        {"data": 2},
        {"divergence": 1.0, "states": ("1:1",), "state_loss": "mse", "state_weight": 0.5},
        {},
    ),
    "data, under rounding": (
        {"data": 2, "fsdp": "parameters"},
        {"divergence": 1.0, "teacher_plan": PlanConfig(data=2, microbatches=2)},
        {"precision": QAD},
    ),
}


@several_devices
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_all_logits(name, tmp_path):
    plan, distill, more = CASES[name]
    config = run_config(STUDENT, plan=plan)
    if "states" in distill:
        (tmp_path / "pruning.json").write_text(json.dumps({"kept": {"hidden": CHANNELS}}))
        config, distill = dataclasses.replace(config, model=NARROW), {**distill, "state_channels": str(tmp_path)}
    config = dataclasses.replace(config, distill=DistillConfig(**distill), **more).check()
    (batch,) = packed_batches(config, 1)
    laid, built = assemble(config.model, config.plan, length=config.train.sequence_length)
    laid = in_formats(laid, config.precision, config.model)
    teacher = Teacher(InMemory(TEACHER), config, laid, top_k=config.distill.top_k)
    placed = batch_to_devices(batch, laid)
    placed = placed._replace(extras=teacher.extras(batch))
    streams = {f"teacher_stream_{number}" for number in range(len(config.distill.states))}
    assert set(placed.extras) == streams | ({HIDDEN} if config.distill.top_k is None else {IDS, "teacher_log"})
    objective, student = make_objective(config.distill), initial_state(config.model, config.train.seed)
    function = gradients(built, objective, config.model, laid, "float32", frozen=teacher.variables)
    start = jax.device_put(
        tuple(built.laid(part) for part in student), placement.shardings((built.params, built.buffers), laid)
    )

    def step(params, buffers, batch, frozen):
        loss, grads, counts, sums = function(placement.working(params, laid), buffers, batch, frozen=frozen)
        return loss, built.whole(grads), counts.metrics, sums.metrics

    with jax.default_matmul_precision("highest"):
        loss, grads, counts, sums = jax.device_get(jax.jit(step)(*start, placed, teacher.variables))
        wanted, wanted_grads = jax.device_get(expected(config, batch))
    assert loss == pytest.approx(wanted, rel=2e-6) and wanted > 0.1
    of_states = config.distill.state_weight * sums.get("states", 0) / counts[DISTILLATION]
    assert sums[DISTILLATION] / counts[DISTILLATION] + of_states == pytest.approx(loss, rel=1e-6)
    assert (sums[DIVERGENCE] == sums[DISTILLATION]) == (config.distill.cross_entropy == 0)
    for (path, got), want in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(wanted_grads), strict=True):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < 2e-5, (jax.tree_util.keystr(path), error)


def test_the_teacher_s_own_plan():
    config = run_config(STUDENT, plan={"data": 2, "stage": 2, "microbatches": 2, "remat": "full"}, batch_size=8)
    plan = teacher_plan(config, DistillConfig(divergence=1.0))
    assert (plan.data, plan.stage, plan.microbatches, plan.remat) == (4, 1, 1, "none")
    with pytest.raises(ValueError, match="teacher_plan has 2 devices; expected the run's 4"):
        teacher_plan(config, DistillConfig(divergence=1.0, teacher_plan=PlanConfig(data=2)))
    with pytest.raises(ValueError, match=r"PlanConfig.stage is 4; expected 1 for a teacher"):
        teacher_plan(config, DistillConfig(divergence=1.0, teacher_plan=PlanConfig(stage=4)))
    with pytest.raises(ValueError, match=r"batch_size is 8; expected a multiple of .* = 4 x 3"):
        teacher_plan(config, DistillConfig(divergence=1.0, teacher_plan=PlanConfig(data=4, microbatches=3)))


def test_a_teacher_that_does_not_fit_is_refused():
    """Of the student 12 bytes per parameter and its gradients; the teacher's 4, and 24 tokens of 36 numbers."""
    config = dataclasses.replace(run_config(STUDENT, batch_size=1), distill=DistillConfig(divergence=1.0))
    least = 16 * count(STUDENT)["total"] + 4 * count(TEACHER)["total"] + 24 * 36 * 4
    require_distillation_fits(config, TEACHER, PlanConfig(), Memory(10**9, least))
    with pytest.raises(ValueError, match=f"distillation needs at least {least:,} bytes"):
        require_distillation_fits(config, TEACHER, PlanConfig(), Memory(10**9, least - 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": 0.0}, "divergence is 0.0; expected above 0, since cross_entropy is 0"),
        ({"divergence": -1.0}, "divergence is -1.0; expected 0 or more"),
        ({"divergence": 1.0, "temperature": 0.0}, "temperature is 0.0; expected a number above 0"),
        ({"divergence": 1.0, "rest": "drop"}, "rest is 'drop'; expected one of renormalize, bucket"),
        ({"divergence": 1.0, "rest": "bucket", "temperature": 2.0}, "rest is 'bucket'; expected renormalize"),
        ({"divergence": 1.0, "logits": ""}, "logits is ''; expected a folder"),
        ({"divergence": 1.0, "states": ("1-2",)}, r"states is \('1-2',\); expected different pairs STUDENT:TEACHER"),
        ({"divergence": 1.0, "states": ("1:2", "1:2")}, "states is .* expected different pairs"),
        ({"divergence": 1.0, "states": ("1:2",), "logits": "x"}, r"states is .* expected \(\): stored logits have no"),
        ({"divergence": 1.0, "state_loss": "l1"}, "state_loss is 'l1'; expected one of cosine, mse"),
        ({"divergence": 1.0, "state_weight": 0.0}, "state_weight is 0.0; expected a number above 0"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**fields)


def test_states_that_cannot_be_compared_are_refused(tmp_path):
    def check(model=NARROW, plan=None, **distill):
        config = run_config(model, plan=plan)
        distill = {"divergence": 1.0, "states": ("1:2",), "state_channels": str(tmp_path), **distill}
        check_states(dataclasses.replace(config, distill=DistillConfig(**distill)), TEACHER)

    (tmp_path / "pruning.json").write_text(json.dumps({"kept": {"hidden": CHANNELS}}))
    check()
    for pairs, who, layers in ((("2:2",), "student", 2), (("0:3",), "teacher", 3)):
        with pytest.raises(ValueError, match=f"states is .* expected numbers below {layers}, the layers of the {who}"):
            check(states=pairs)
    with pytest.raises(ValueError, match=r"PlanConfig.stage is 2; expected 1 with DistillConfig.states"):
        check(plan={"stage": 2, "microbatches": 2})
    with pytest.raises(ValueError, match=r"hidden_size is 48; expected 36, the teacher's, or DistillConfig.state_chan"):
        check(STUDENT, state_channels=None)
    with pytest.raises(ValueError, match=r"keeps 20 channels of the residual stream; expected 48 different ones"):
        check(STUDENT)
    (tmp_path / "pruning.json").write_text(json.dumps({"kept": {"hidden": None}}))
    check(hybrid(pattern="M*", vocab_size=97, mtp_depths=0, hidden_size=36))  # no channel was pruned


RECIPE = (
    RUN.replace("hidden_size = 12", "hidden_size = 10")
    + """
DistillConfig.divergence = 0.75
DistillConfig.cross_entropy = 0.25
DistillConfig.teacher_plan = @teacher/PlanConfig()
teacher/PlanConfig.microbatches = 2
TrainConfig.evaluate_every = 2
OptimizerConfig.schedule = 'constant'
"""
)
TIMED = ("tokens_per_second", "step_ms", "start_seconds", "compile_seconds", "evaluate_seconds", "save_seconds")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder with a corpus, a trained teacher, and the gin file of a student."""
    folder = tmp_path_factory.mktemp("taught")
    (folder / "corpus").mkdir()
    for number in range(20):
        (folder / "corpus" / f"{number}.txt").write_text(f"document {number}\n")
    for name, text in (("teacher", RUN), ("student", RECIPE)):
        (folder / f"{name}.gin").write_text(text.format(corpus=str(folder / "corpus")))
    assert main(["train", "--gin_file", str(folder / "teacher.gin"), "--run", str(folder / "teacher")]) == 0
    return folder


def distill(taught, run, *more):
    """Runs the command; gives its records without times."""
    arguments = ["--checkpoint", taught / "teacher", "--gin_file", taught / "student.gin", "--run", taught / run, *more]
    assert main(["distill", *map(str, arguments)]) == 0
    return [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(taught / run)]


def test_a_student_goes_on_to_the_bit_without_its_teacher_in_the_checkpoint(taught, refused, capsys):
    steps = lambda count: ("--gin_bindings", f"TrainConfig.steps = {count}")  # noqa: E731
    whole = distill(taught, "whole", *steps(4))
    distill(taught, "parts", *steps(2))
    parts = distill(taught, "parts", "--resume", *steps(4))
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]
    assert parts[3] == whole[3] and parts[3]["heldout_divergence"] > 0
    assert all(line["distillation"] == pytest.approx(0.75 * line["divergence"] + 0.25 * line["loss"]) for line in whole)
    opened = open_model(taught / "whole")
    assert opened.config.hidden_size == 10
    shapes = jax.tree.map(jnp.shape, opened.params)
    assert shapes == jax.tree.map(jnp.shape, build(opened.config).params)
    # Another teacher than that of the first steps.
    capsys.readouterr()
    other = ["distill", "--checkpoint", taught / "whole", "--gin_file", taught / "student.gin", "--resume", "--run"]
    assert "teacher = " in refused(*other, taught / "parts", *steps(6))


def test_a_run_s_config_is_written_with_the_teacher_s_plan(taught, tmp_path):
    config, _ = load([taught / "student.gin"])
    assert config.distill.teacher_plan == PlanConfig(microbatches=2)
    (tmp_path / "again.gin").write_text(run_text(config))
    assert load([tmp_path / "again.gin"])[0] == config


def test_a_new_student_may_have_as_many_rows_as_a_released_teacher(taught):
    """The teacher's tokenizer has fewer tokens than the models have rows."""
    config, _ = load([taught / "student.gin"], ["ModelConfig.vocab_size = 300"])
    task = Distillation(InMemory(config.model), config.distill, run_dir=taught / "new", student=None).task()
    task = dataclasses.replace(task, open=PRETRAINING.open)
    assert _open_corpus(task, config, taught / "new", None).tokenizer.vocab_size == 259
    with pytest.raises(ValueError, match="vocab_size = 300: expected 259"):
        _open_corpus(dataclasses.replace(task, more_rows=False), config, taught / "new", None)


def test_bad_input_is_one_line(taught, refused):
    command = ["distill", "--checkpoint", taught / "teacher", "--run", taught / "new", "--gin_file"]
    line = refused(*command, taught / "student.gin", "--gin_bindings", "ModelConfig.vocab_size = 300")
    assert "ModelConfig.vocab_size is 300; expected 259, the teacher's" in line
    line = refused(*command, taught / "student.gin", "--gin_bindings", "DistillConfig.top_k = 260")
    assert "DistillConfig.top_k is 260; expected at most 259, as many as ModelConfig.vocab_size" in line
    assert "no bindings of DistillConfig" in refused(*command, taught / "teacher.gin")
    line = refused("train", "--run", taught / "new", "--gin_file", taught / "student.gin")
    assert "DistillConfig has bindings; expected none: this task has no teacher" in line
    line = refused(*command, taught / "student.gin", "--gin_bindings", "TrainConfig.seed = 1",
                   "--student", taught / "teacher")  # fmt: skip
    assert "ModelConfig.hidden_size is 10; expected 12" in line
    assert json.loads((taught / "teacher" / "env.json").read_text())["parameters"]["total"] > 0


def test_stored_logits_train_as_the_living_teacher(taught, refused, capsys):
    """The same run, once with the teacher and once with what it wrote, whose numbers are rounded to float16."""
    top = ("--gin_bindings", "DistillConfig.top_k = 9", "--gin_bindings", "DistillConfig.rest = 'bucket'")
    living = distill(taught, "living", *top)
    command = ["distill", "--checkpoint", taught / "teacher", "--gin_file", taught / "student.gin"]
    write = [*command, *top, "--write_logits", taught / "logits"]
    assert main(list(map(str, write))) == 0
    stored = f"DistillConfig.logits = {str(taught / 'logits')!r}"
    # Without the plan of a teacher that does not run.
    text = (taught / "student.gin").read_text().replace("DistillConfig.teacher_plan = @teacher/PlanConfig()\n", "")
    (taught / "stored.gin").write_text(text.replace("teacher/PlanConfig.microbatches = 2\n", ""))
    alone = ["distill", "--gin_file", taught / "stored.gin", "--gin_bindings", stored]
    run = [*alone, *top, "--run"]
    assert main(list(map(str, [*run, taught / "read"]))) == 0
    for one, other in zip(living, read_metrics(taught / "read"), strict=True):
        for name in ("divergence", "loss"):
            assert other[name] == pytest.approx(one[name], rel=2e-3)
        assert "heldout_divergence" not in other
    capsys.readouterr()
    assert "exists; expected a new one" in refused(*write)
    short = ("--gin_bindings", "TrainConfig.sequence_length = 12")
    assert "sequence_length = 24; expected 12, that of this run" in refused(*run, taught / "new", *short)
    more = ("--gin_bindings", "DistillConfig.top_k = 10")
    assert "top_k is 10; expected at most 9" in refused(*alone, *more, "--run", taught / "new")
    other = ("--gin_bindings", "DataConfig.seed = 7")
    assert "expected" in refused(*run[:-1], "--student", taught / "whole", "--run", taught / "new", *other)
    assert "expected one of them" in refused(*command)
    preferred = ("--gin_bindings", "PreferenceConfig.loss = 'dpo'", "--gin_bindings", "PreferenceConfig.template = 'x'")
    line = refused(*command, *top, *preferred, "--write_logits", taught / "more")
    assert "PreferenceConfig has bindings; expected none: this task reads no pairs of answers" in line
    # As whole as the logits that the teacher of --checkpoint wrote, but another's.
    both = ["--gin_bindings", stored, *top, "--gin_file", taught / "stored.gin"]
    line = refused("distill", "--checkpoint", taught / "living", *both, "--run", taught / "new")
    assert "are of another teacher than --checkpoint; expected its own" in line
    config, _ = load([taught / "stored.gin"], [stored])
    with open_folder(taught / "teacher") as folder:
        task = Distillation(folder, config.distill, run_dir=taught / "new", student=None)
        assert task.open(config, None).content_hash
    # A run that learned all tokens, of an earlier test or begun here, does not go on with the nine that are stored.
    if not (taught / "parts").exists():
        distill(taught, "parts", "--gin_bindings", "TrainConfig.steps = 2")
        capsys.readouterr()
    line = refused(*alone, "--run", taught / "parts", "--resume", "--gin_bindings", "TrainConfig.steps = 6")
    assert "position has top_k = None; expected 9, as here" in line
