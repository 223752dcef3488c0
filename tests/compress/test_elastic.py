"""Elastic distillation: the router and its budget loss by hand, plans against one device, whole runs, refusals."""

import dataclasses
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.helpers import RUN, bound, hybrid, run_config, several_devices

from orogen.checkpoint.leaves import leaves_of
from orogen.checkpoint.open import open_model
from orogen.cli import main
from orogen.compress.elastic import Chosen, Elastic
from orogen.compress.nested import Nesting
from orogen.config.checks import ConfigError
from orogen.config.elastic import ElasticConfig
from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.cost.assemble import assemble
from orogen.model.count import count
from orogen.model.lm import initial_state
from orogen.report.metrics import read_metrics
from orogen.train.pretraining import PRETRAINING
from orogen.train.sides import packed_batch
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices, make_step, update_bias
from orogen.train.submodels import with_chooser
from orogen.train.trained import optimizer_of

# Attention with two query heads of each key head's four left, Mamba with four of each group's six, an odd MLP.
MODEL = hybrid(pattern="M*E-", mtp_depths=0, num_attention_heads=8, mamba_num_heads=12, n_routed_experts=12)
SIZES = {"hidden_size": (24, 40), "intermediate_size": (37,), "num_attention_heads": (4,), "mamba_num_heads": (8,),
         "n_routed_experts": (8,)}  # fmt: skip
ELASTIC = ElasticConfig(budgets=(0.6, 0.8, 1.0), **SIZES)


def config_of(elastic=ELASTIC, model=MODEL, plan=None, **train):
    train = {"batch_size": 4, "sequence_length": 16, **train}
    return dataclasses.replace(run_config(model, plan=plan, **train), elastic=elastic)


@pytest.fixture(scope="module")
def made():
    """The submodels of ELASTIC, with a router that prefers some."""
    elastic = Elastic(config_of(steps=100))
    chooser = elastic.initial()
    router = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape) * 0.1, chooser.router)
    return elastic, chooser._replace(router=router)


def logits_of(part, budget, scale):
    hidden = part["in_nh"][budget] + part["in_h"]
    return scale * (np.where(hidden > 0, hidden, 0.1 * hidden) @ part["out_hc"] + part["out_c"])


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def parameters(model):
    """Of a model with one layer of experts, whose correction biases are no cost."""
    return count(model)["total"] - model.n_routed_experts


def test_costs_are_those_of_each_submodel(made):
    elastic, whole = made[0], parameters(MODEL)
    fields = list(SIZES)
    assert fields == list(elastic.nesting.choices) and elastic.costs.shape == (3, 2, 2, 2, 2)
    for place in [(0, 0, 0, 0, 0), (1, 0, 1, 0, 1), (2, 1, 1, 1, 1), (0, 1, 0, 1, 0)]:
        sizes = {field: elastic.nesting.choices[field][i] for field, i in zip(fields, place, strict=True)}
        assert elastic.costs[place] == pytest.approx(parameters(dataclasses.replace(MODEL, **sizes)) / whole)


@pytest.mark.parametrize(("budget", "step"), [(0, 0), (1, 99), (2, 50)])
def test_the_budget_loss_is_the_distance_of_the_expected_cost(made, budget, step):
    elastic, chooser = made
    parts = {field: jax.tree.map(np.asarray, part) for field, part in chooser.router.items()}
    chances = [softmax(logits_of(part, budget, 1 + 9 * step / 99)) for part in parts.values()]
    expected = sum(
        np.prod([chance[i] for chance, i in zip(chances, place, strict=True)]) * elastic.costs[place]
        for place in itertools.product(*(range(len(chance)) for chance in chances))
    )
    apart = abs(expected / ELASTIC.budgets[budget] - 1)
    assert apart > 0.05
    found = elastic.budget_loss(chooser.router, jnp.asarray(budget), jnp.asarray(step))
    np.testing.assert_allclose(found, 0 if budget == 2 else apart, rtol=2e-5)
    near = dataclasses.replace(elastic.config, elastic=dataclasses.replace(ELASTIC, tolerance=apart * 1.01))
    assert Elastic(near).budget_loss(chooser.router, jnp.asarray(budget), jnp.asarray(step)) == 0


def test_a_step_takes_one_choice_and_its_gradient_is_that_of_the_probabilities(made):
    """At every step the picks are exact; at budget 1.0 they are the whole model's."""
    elastic, chooser = made
    picked = jax.jit(jax.vmap(lambda step: elastic.chosen(chooser, step)[0].picks))(jnp.arange(60))
    for values in picked.values():
        assert set(np.unique(values)) == {0.0, 1.0} and (np.asarray(values).sum(1) == 1).all()
    whole = np.logical_and.reduce([np.asarray(values)[:, -1] == 1 for values in picked.values()])
    assert 10 < whole.sum() < 35  # a third, and by chance the others
    key, temperature = jax.random.key(7), jnp.float32(0.7)
    value = lambda router: elastic._picks(router, 1, jnp.asarray(9), key, temperature)["hidden_size"]  # noqa: E731
    found = jax.grad(lambda router: value(router) @ jnp.array([1.0, -2.0, 5.0]))(chooser.router)
    scale, soft, ways = 1 + 9 * 9 / 99, np.zeros(3), {}
    parts = [jax.tree.map(np.asarray, part) for part in chooser.router.values()]
    keys = [jax.random.fold_in(key, number) for number in range(len(parts))]
    noises = [np.asarray(jax.random.gumbel(k, part["out_c"].shape)) for k, part in zip(keys, parts, strict=True)]
    drawn = [(logits_of(part, 1, scale) + noise) / 0.7 for part, noise in zip(parts, noises, strict=True)]
    for place in itertools.product(*(range(len(values)) for values in drawn)):
        if 0.95 * 0.8 <= elastic.costs[place] <= 0.8:  # of the submodels that the budget allows
            ways[place] = np.exp(sum(values[i] for values, i in zip(drawn, place, strict=True)))
    for place, weight in ways.items():
        soft[place[0]] += weight / sum(ways.values())
    assert 1 < len(ways) < elastic.costs.size
    weighed = np.array([1.0, -2.0, 5.0])
    expected = scale / 0.7 * soft * (weighed - soft @ weighed)
    np.testing.assert_allclose(found["hidden_size"]["out_c"], expected, rtol=1e-4)
    # The whole model is taken whatever the router says, so it learns nothing from it.
    value = lambda router: elastic._picks(router, 2, jnp.asarray(9), key, temperature)["hidden_size"]  # noqa: E731
    found = jax.grad(lambda router: value(router) @ jnp.array([1.0, -2.0, 5.0]))(chooser.router)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found))


def test_budgets_are_drawn_by_their_weights_and_later_by_others():
    """What is trained for a budget is what it allows to be cut out, even if the router prefers submodels just above it:
    else the one that is cut out was never trained."""
    weights = {"weights": (1, 0, 0), "later_weights": (0, 0, 1), "later_after": 20}
    elastic = Elastic(config_of(dataclasses.replace(ELASTIC, **weights)))
    costs = elastic.costs
    above = np.argwhere((costs > 0.6) & (costs < 0.63))[0]
    router = {}
    for (field, part), place in zip(elastic.initial().router.items(), above, strict=True):
        router[field] = jax.tree.map(jnp.zeros_like, part)
        router[field]["out_c"] = part["out_c"].at[place].set(5.0)
    chooser = elastic.initial()._replace(router=router)
    picked = jax.jit(jax.vmap(lambda step: elastic.chosen(chooser, step)[0].picks))(jnp.arange(40))
    places = np.stack([np.asarray(values).argmax(1) for values in picked.values()], 1)
    taken = np.array([costs[tuple(place)] for place in places])
    assert ((0.95 * 0.6 <= taken[:20]) & (taken[:20] <= 0.6)).all() and (taken[20:] == 1).all()
    sizes, cost = elastic.sizes(chooser, 0)
    assert 0.95 * 0.6 <= cost <= 0.6 and len(sizes) == len(picked)


def test_a_router_learns_its_budgets():
    """By the budget loss alone: the expected cost comes to within the tolerance, and the choice keeps the budget."""
    elastic = Elastic(config_of(dataclasses.replace(ELASTIC, sharpness=1.0), steps=300))

    def step(chooser, number):
        _, learned = elastic.chosen(chooser, number)
        zeros = {field: jnp.zeros(len(choices)) for field, choices in elastic.nesting.choices.items()}
        return learned(Chosen(zeros)), None

    chooser, _ = jax.jit(lambda chooser: jax.lax.scan(step, chooser, jnp.arange(300)))(elastic.initial())
    for budget in (0, 1):
        assert elastic.budget_loss(chooser.router, jnp.asarray(budget), jnp.asarray(299)) < 0.06
        sizes, cost = elastic.sizes(chooser, budget)
        assert 0.95 * ELASTIC.budgets[budget] <= cost <= ELASTIC.budgets[budget]
        assert cost == pytest.approx(parameters(dataclasses.replace(MODEL, **sizes)) / parameters(MODEL))


def test_a_mask_has_the_gradient_of_what_units_write(made):
    """Of an MLP's units: the sum over `down` of weight times gradient; `up`, whose product they also are, adds none."""
    elastic = made[0]
    params, _ = initial_state(MODEL, 0)
    random = np.random.default_rng(3)
    grads = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), params)
    picks = elastic.nesting.picks({"hidden_size": 40, "intermediate_size": 37})
    _, back = jax.vjp(elastic.nesting.masked, params, picks)
    of_params, of_picks = back(grads)
    mixer = lambda tree, name: np.asarray(tree["backbone"]["children"][3]["mixer"][name][...])  # noqa: E731
    written = (mixer(params, "down") * mixer(grads, "down"))[:, :40].sum(1)
    np.testing.assert_allclose(of_picks["intermediate_size"], [written[:37].sum(), written.sum()], rtol=1e-4)
    assert (mixer(of_params, "up")[:, 37:] == 0).all() and (mixer(of_params, "up")[40:] == 0).all()
    np.testing.assert_array_equal(mixer(of_params, "up")[:40, :37], mixer(grads, "up")[:40, :37])


def test_absent_experts_keep_their_biases(made):
    (found,) = made[0].present_experts(Chosen(made[0].nesting.picks({"n_routed_experts": 8})))
    np.testing.assert_array_equal(found, [1] * 8 + [0] * 4)
    layers = Nesting(MODEL, {"n_routed_experts": (8, 12), "num_layers": (3, 4)}, (2,))
    for number, expected in ((4, [1] * 8 + [0] * 4), (3, [0] * 12)):  # without the layer all are absent
        (found,) = layers.present_experts(layers.picks({"n_routed_experts": 8, "num_layers": number}))
        np.testing.assert_array_equal(found.reshape(-1), expected)
    # An even share that no float32 has, of 96 of 128 experts: of one layer, and of one that is removed.
    load_le = np.random.default_rng(5).integers(0, 50, (2, 128)).astype(np.float32)
    load_le[0, :97] += [*[0] * 96, 7]
    present_le = np.zeros((2, 128), np.float32)
    present_le[0, :96] = 1
    share = load_le[0, :96].sum(dtype=np.float64) / 96
    assert share != round(share)
    after_le = jax.jit(update_bias)(jnp.full((2, 128), 0.5), load_le * present_le, 0.25, present_le)
    np.testing.assert_array_equal(after_le[0, :96], 0.5 + 0.25 * np.sign(share - load_le[0, :96]))
    assert (after_le[0, 96:] == 0.5).all() and (after_le[1] == 0.5).all()


def test_with_a_latent_a_unit_and_a_layer_count_once():
    """The gradients are derivatives of a scaling: of latent_up's inputs, and of what layers add to the stream."""
    model = ModelConfig(
        pattern="E-", vocab_size=259, hidden_size=6, intermediate_size=7, n_routed_experts=3, num_experts_per_tok=2,
        moe_intermediate_size=5, moe_latent_size=4, moe_shared_expert_intermediate_size=3,
    )  # fmt: skip
    nested = Nesting(model, {"moe_latent_size": (3, 4), "num_layers": (1, 2)}, (0,))
    params, _ = initial_state(model, 0)
    random = np.random.default_rng(3)
    grads = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), params)
    _, back = jax.vjp(lambda picks: nested.masked(params, picks), nested.picks({}))
    (found,) = back(grads)
    experts, mlp = ([tree["backbone"]["children"][n]["mixer"] for tree in (params, grads)] for n in (0, 1))
    scaled = lambda pair: pair[0][...] * pair[1][...]  # noqa: E731
    latent_ud = scaled([layer["latent_up"] for layer in experts])
    np.testing.assert_allclose(found["moe_latent_size"], [latent_ud[:3].sum(), latent_ud.sum()], rtol=1e-5)
    shared, down = (scaled([tree["down"] for tree in pair]).sum() for pair in ([e["shared"] for e in experts], mlp))
    np.testing.assert_allclose(found["num_layers"], [down, down + latent_ud.sum() + shared], rtol=1e-5)


def stepped(plan):
    """The state and the metrics after one step of the smallest budget, on the host."""
    elastic = dataclasses.replace(ELASTIC, weights=(1, 0, 0))
    config = config_of(elastic, plan=plan)
    # An update is then nearly proportional to its gradient, not to the sign of one that is almost zero.
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, epsilon=1e-2))
    layout, built = assemble(MODEL, config.plan, length=16)
    optimizer, submodels = optimizer_of(config, built), Elastic(config)
    state = with_chooser(create_state(MODEL, built, optimizer, layout, 0), submodels, layout)
    step = make_step(built, PRETRAINING.objective, config, layout, optimizer, submodels=submodels)
    state, metrics = step(state, batch_to_devices(packed_batch(config, config.train), layout))
    of_router = state.chooser.moments[0].mu
    return jax.device_get((built.whole(state.params), of_router)), jax.device_get(metrics)


@pytest.mark.parametrize(
    ("name", "place"),
    [(("norm", "weight"), 3), (("backbone", "children", 0, "mixer", "norm", "weight"), 5),
     (("backbone", "children", 2, "mixer", "router", "gate"), (slice(None), 4)),
     (("backbone", "children", 2, "mixer", "router", "gate"), 0)],
)  # fmt: skip
def test_zeros_that_would_mean_absent_are_refused(made, name, place):
    params, _ = initial_state(MODEL, 0)
    made[0].check(params)
    leaf = leaves_of(params)[name]
    leaf.set_value(leaf.get_value().at[place].set(0))
    with pytest.raises(ConfigError, match=rf"student's {'.'.join(map(str, name))} has zeros"):
        made[0].check(params)


@several_devices
def test_plans_train_the_same_submodel():
    """Mamba's group of six heads, four of them there, lies on two ranks of tensor; experts fold onto all devices."""
    plan = {"data": 2, "tensor": 4, "expert": 4, "fsdp": "parameters", "dispatch": "alltoall", "capacity_factor": 12.0}
    (alone, of_alone), (folded, of_folded) = stepped({}), stepped(plan)
    np.testing.assert_allclose(of_folded.loss, of_alone.loss, rtol=1e-6)
    np.testing.assert_allclose(of_folded.grad_norm, of_alone.grad_norm, rtol=1e-5)
    largest = lambda trees: max(np.abs(leaf).max() for leaf in jax.tree.leaves(trees))  # noqa: E731
    for one, other in zip(alone, folded, strict=True):
        apart = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), one, other)
        assert largest(apart) < 2e-5 * largest(one)


MORE = """
OptimizerConfig.schedule = 'constant'
ModelConfig.mamba_num_heads = 6
ModelConfig.mamba_head_dim = 4
ModelConfig.n_groups = 2
ModelConfig.ssm_state_size = 5
ModelConfig.chunk_size = 8
DistillConfig.divergence = 1.0
ElasticConfig.budgets = (0.7, 1.0)
ElasticConfig.hidden_size = (8,)
ElasticConfig.mamba_num_heads = (2, 4)
ElasticConfig.num_layers = (2, 3)
ElasticConfig.removal = (3, 1)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a corpus, a teacher, and the gin file of an elastic run."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "corpus").mkdir()
    for number in range(20):
        (folder / "corpus" / f"{number}.txt").write_text(f"document {number}\n")
    student = (RUN + MORE).replace("'*-'", "'M*-M'").format(corpus=str(folder / "corpus"))
    (folder / "student.gin").write_text(student)
    teacher = [line for line in student.splitlines() if not line.startswith(("Distill", "Elastic"))]
    (folder / "teacher.gin").write_text("\n".join(teacher))
    assert main(["train", "--gin_file", str(folder / "teacher.gin"), "--run", str(folder / "teacher")]) == 0
    return folder


def command(text, run, *more):
    teacher = str(text / "teacher")
    asked = ["distill", "--checkpoint", teacher, "--student", teacher, "--gin_file", str(text / "student.gin")]
    return [*asked, "--run", str(text / run), *map(str, more)]


def test_a_run_goes_on_to_the_bit_and_its_submodel_is_cut_out(text, capsys):
    # As if killed after its second step: a program for fewer steps may round otherwise, and the first gradient, of a
    # student that is still its teacher, is nothing but rounding.
    steps = bound("TrainConfig.steps = 4", "TrainConfig.checkpoint_every = 2")
    assert main(command(text, "whole", *steps)) == 0
    shutil.copytree(text / "whole", text / "parts")
    shutil.rmtree(text / "parts" / "checkpoints" / "4")
    (text / "parts" / "budget_0.7.gin").unlink()
    other = bound("ElasticConfig.tolerance = 0.2")
    assert main(command(text, "parts", "--resume", *steps, *other)) == 2
    assert "ElasticConfig.tolerance is 0.05 there and 0.2 here" in capsys.readouterr().err
    assert main(command(text, "parts", "--resume", *steps)) == 0
    assert "step 3/4" in capsys.readouterr().err
    whole, parts = (read_metrics(text / name)[-1] for name in ("whole", "parts"))
    assert whole["loss"] == parts["loss"] and whole["whole_heldout_loss_at_0.7"] == parts["whole_heldout_loss_at_0.7"]
    file = text / "whole" / "budget_0.7.gin"
    assert file.read_text() == (text / "parts" / "budget_0.7.gin").read_text()
    asked = ["prune", "--checkpoint", str(text / "whole"), "--gin_file", str(file), "--out", str(text / "submodel")]
    assert main(asked) == 0
    submodel, model = open_model(text / "submodel"), load([text / "student.gin"])[0].model
    share = count(submodel.config)["total"] / count(model)["total"]
    assert share <= 0.7 and f"# {share:.4f} of the model's parameters" in file.read_text()
    # The slice has the loss that the run measured by masks.
    again = [str(text / "submodel"), "--gin_file", str(text / "teacher.gin"), "--run", str(text / "again")]
    sizes = {name: getattr(submodel.config, name) for name in ("pattern", "hidden_size", "mamba_num_heads")}
    fields = [f"ModelConfig.{name} = {value!r}" for name, value in sizes.items()]
    still = ["OptimizerConfig.learning_rate = 1e-30", "TrainConfig.steps = 1", "OptimizerConfig.weight_decay = 0.0"]
    assert main(["train", "--checkpoint", *again, *bound(*fields, *still)]) == 0
    measured = read_metrics(text / "again")[-1]["whole_heldout_loss"]
    assert measured == pytest.approx(whole["whole_heldout_loss_at_0.7"], rel=1e-6)


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["ElasticConfig.budgets = (0.1, 1.0)"], "ElasticConfig.budgets is (0.1, 1.0); expected at least 0."),
        (["ElasticConfig.mamba_num_heads = (3,)"], "ElasticConfig.mamba_num_heads is 3; expected 4, the nearest"),
        (["ElasticConfig.hidden_size = (12,)"], "ElasticConfig.hidden_size is (12,); expected numbers below 12"),
        (["ElasticConfig.removal = (3,)"], "ElasticConfig.removal is (3,); expected 2 of the 4 layers"),
        (["ElasticConfig.n_routed_experts = (4,)"], "n_routed_experts is 4; expected None: the model has no"),
        (["ModelConfig.norm = 'layer'", *(f"ElasticConfig.{field} = ()" for field in ("num_layers", "removal"))],
         "none with ModelConfig.norm = 'layer': norms of the form 'rms' alone"),
        (["DataConfig.heldout_fraction = 0.0"], "heldout_fraction is 0.0; expected above 0 with"),
        (["ElasticConfig.context = 9"], "ElasticConfig.cost is not 'gib'"),
        (["ElasticConfig.weights = (1.0,)"], "ElasticConfig.weights is (1.0,); expected 2 shares, one for each budget"),
        (["ElasticConfig.budgets = (1.0, 0.5)"], "rising from above 0 to 1.0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(text, capsys, bindings, message):
    alone = command(text, "new")
    del alone[3:5]  # a new student, so that its sizes may differ
    assert main([*alone, *bound(*bindings)]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and len(err.splitlines()) == 1


def test_other_tasks_and_pipelines_are_refused(text, capsys):
    student = ["--gin_file", str(text / "student.gin"), "--run", str(text / "new")]
    assert main(["train", *student, *bound("DistillConfig.divergence = 1.0")]) == 2
    assert "this task" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"PlanConfig.stage is 2; expected 1: submodels"):
        Elastic(config_of(plan={"stage": 2, "microbatches": 2, "shift": "alltoall"}))
    with pytest.raises(ConfigError, match=r"expected 'plain'|expected plain"):
        Elastic(config_of(plan={"rms_norm": "triton"}))
