"""What a device holds: counted by hand, and confirmed by the compiled step."""

import json

import pytest
from tests.helpers import hybrid, run_config

from orogen.cli import main
from orogen.cost.ledger import Workload
from orogen.simulate.memory import describe_memory, memory_lines

D, F, VOCABULARY, HEADS = 48, 72, 96, 24 * 4
ATTENTION = D * HEADS + 2 * D * 2 * 4 + HEADS * D
MATRICES = VOCABULARY * D * 2 + 2 * D * F + ATTENTION
VECTORS = 3 * D  # the norms of two layers and the final norm
ROWS, TOKENS = 2, 24


@pytest.fixture(scope="module")
def facts():
    """An MLP and an attention layer in bfloat16, on two data ranks that shard master parameters and optimizer state."""
    plan = {"data": 2, "fsdp": "optimizer", "remat": "*:core"}
    config = run_config(hybrid(pattern="-*", mtp_depths=0), plan=plan, compute_dtype="bfloat16")
    return describe_memory(config, Workload(ROWS, TOKENS, 2))


def test_state_is_the_stored_pieces(facts):
    masters = 4 * (MATRICES // 2 + VECTORS)
    assert facts["devices"] == 2
    assert facts["state"] == {
        "parameters": masters,
        "working": 2 * MATRICES,
        "gradients": 4 * (MATRICES + VECTORS),  # scattered once per step, at its end
        "optimizer": 2 * masters + 2 * 4,  # two moments and two counts
        "buffers": 0,
    }


def test_activations_are_those_of_each_layer(facts):
    tokens = ROWS * TOKENS
    assert facts["activations"] == {
        "-": {"layers": 1, "bytes": {"up": 2 * F * tokens, "activation": 2 * F * tokens, "input": 2 * D * tokens,
                                     "norm": 2 * D * tokens}},
        "*": {"layers": 1, "bytes": {"query": 2 * HEADS * tokens, "attention": 2 * HEADS * tokens,
                                     "input": 2 * D * tokens, "norm": 2 * D * tokens, "key": 2 * 8 * tokens,
                                     "value": 2 * 8 * tokens}},
    }  # fmt: skip
    assert facts["activation_bytes"] == 2 * tokens * (2 * F + 4 * D + 2 * HEADS + 2 * 8)


def test_the_compiled_step_takes_the_state_and_a_batch_and_gives_the_state_back(facts):
    state, compiled = facts["state"], facts["compiled"]
    held = state["parameters"] + state["optimizer"] + 3 * 4
    assert compiled["arguments"] == held + 3 * ROWS * TOKENS * 4  # no layer here reads positions
    assert compiled["aliased"] == held
    assert compiled["temporary"] > facts["activation_bytes"]


def test_a_stage_holds_its_own_layers_and_a_slot_for_each_microbatch_in_flight():
    """Two stages, each an MLP and an attention layer: half the layers, embedding or head, the norm, two slots."""
    plan = {"stage": 2, "microbatches": 4}
    config = run_config(hybrid(pattern="-*|-*", mtp_depths=0), plan=plan, batch_size=4 * ROWS)
    facts = describe_memory(config, Workload(ROWS, TOKENS, 4))
    assert facts["state"]["parameters"] == 4 * (MATRICES - VOCABULARY * D + VECTORS)
    assert {letter: each["layers"] for letter, each in facts["activations"].items()} == {"-": 2, "*": 2}
    assert facts["activations"]["-"]["bytes"]["up"] == 4 * F * ROWS * TOKENS
    assert facts["compiled"]["aliased"] == facts["state"]["parameters"] * 3 + 2 * 4 + 3 * 4


def test_lines_have_every_number(facts):
    text = "\n".join(memory_lines(facts))
    numbers = [*facts["state"].values(), *facts["compiled"].values(), facts["activation_bytes"]]
    assert all(format(number, ",") in text for number in numbers)


def test_orogen_plan_prints_it(tmp_path, capsys):
    file = tmp_path / "run.gin"
    model = "\n".join(f"ModelConfig.{name} = {value!r}" for name, value in {
        "pattern": "-", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 6,
    }.items())  # fmt: skip
    train = "\n".join(
        f"TrainConfig.{name} = {n}"
        for name, n in {"steps": 1, "batch_size": 2, "sequence_length": 4, "seed": 0}.items()
    )
    file.write_text(f"{model}\n{train}\nOptimizerConfig.learning_rate = 0.1\n")
    assert main(["plan", "--gin_file", str(file), "--memory", "--json", "--fake_devices", "8"]) == 0
    found = json.loads(capsys.readouterr().out)["memory"]
    assert found["activations"]["-"]["bytes"] == {"up": 4 * 6 * 8, "activation": 4 * 6 * 8, "input": 4 * 4 * 8,
                                                  "norm": 4 * 4 * 8}  # fmt: skip
