"""What a program adds to the operations of a layer, counted by hand: launches, casts, sorts, gathers, what it hides."""

import pytest
from tests.helpers import hybrid

from orogen.config.cluster import ClusterConfig
from orogen.config.plan import PlanConfig
from orogen.cost.ledger import Collective, Workload
from orogen.simulate.hardware import Shares, machine
from orogen.simulate.passes import BACKWARD, FORWARD, Passes, Sent

ROWS, TOKENS = 2, 48
MODEL = hybrid(pattern="ME*-", mtp_depths=0)


def passes(plan: PlanConfig | None = None, **constants: float) -> Passes:
    plan = plan or PlanConfig(remat="none", attention="blocked")
    entries = tuple(f"{name}={value}" for name, value in {"host": 1.0, **constants}.items())
    on = machine(ClusterConfig(software="megatron", constants=entries))
    return Passes(MODEL, plan, Workload(ROWS, TOKENS, 2), on, dtype="bfloat16")


def test_a_host_launches_each_kernel_and_each_experts_products():
    """An MLP: norm, up, activation, down, sum. Experts: norm, router, ten of routing, two permutations forth and two
    back, one activation, two products per expert, a latent down and up, a shared expert of three, sum."""
    found = passes()
    assert found.unit("-").host == {FORWARD: 5, BACKWARD: 10}
    experts = 1 + 1 + 10 + 2 + 2 + 1 + 2 * MODEL.n_routed_experts + 2 + 3 + 1
    assert found.unit("E").host == {FORWARD: experts, BACKWARD: 2 * experts}
    assert set(passes(eager=0).unit("E").host.values()) == {0.0}


def test_a_graph_is_launched_as_two_kernels_and_what_depends_on_routing_stays_outside():
    outside = 2 + 2 + 1 + 2 * MODEL.n_routed_experts
    found = passes(graph_mamba=1, graph_router=1)
    assert found.unit("M").host == {FORWARD: 2, BACKWARD: 2}
    assert found.unit("E").host == {FORWARD: outside + 2, BACKWARD: 2 * outside + 2}
    assert found.unit("*").host == passes().unit("*").host


def test_recomputed_kernels_are_launched_twice():
    again = passes(PlanConfig(remat="-:activation", attention="blocked"))
    assert again.unit("-").host == {FORWARD: 5, BACKWARD: 11}
    graph = passes(PlanConfig(remat="full", attention="blocked"), graph_mamba=1)
    assert graph.unit("M").host == {FORWARD: 2, BACKWARD: 2}


def test_collectives_are_launched_once_in_the_pass_that_sends_them():
    """An MLP over two tensor ranks gathers its input and sums its output, and the reverse for gradients. Over data
    ranks it gathers two sharded matrices in each pass, and sums two gradients."""
    tensor = passes(PlanConfig(tensor=2, remat="none", attention="blocked"))
    assert tensor.unit("-").host == {FORWARD: 5 + 2, BACKWARD: 10 + 2}
    plan = PlanConfig(data=4, fsdp="parameters", remat="none", attention="blocked")
    assert passes(plan).unit("-").host == {FORWARD: 5 + 2, BACKWARD: 10 + 2 + 2}
    assert passes(plan, regathers=0).unit("-").host == {FORWARD: 5 + 2, BACKWARD: 10 + 2}


def test_a_device_waits_for_its_host_and_not_the_other_way():
    slow, fast = (passes(host=host).time(["-"], FORWARD) for host in (1.0, 1e-12))
    assert slow.seconds == pytest.approx(5) and fast.waiting == 0
    assert slow.waiting == pytest.approx(5 - fast.seconds)


def test_operands_are_cast_and_rows_sorted():
    """Six bytes per number of the input forward, and of the output's gradient backward."""
    plan = PlanConfig(remat="none", attention="blocked", linear="fp8")
    lines = {(line.operation, phase): line.bytes for phase in (FORWARD, BACKWARD)
             for line in passes(plan, sorts=1).unit("E").work[phase]}  # fmt: skip
    n, latent, width = ROWS * TOKENS, MODEL.moe_latent_size, MODEL.moe_intermediate_size
    rows = n * MODEL.num_experts_per_tok
    assert lines["cast expert_up", FORWARD] == 6 * rows * latent
    assert lines["cast expert_up", BACKWARD] == 6 * rows * width
    assert lines["sort", FORWARD] == 2 * rows * latent * 2
    assert ("cast router", FORWARD) not in lines


def test_the_ssd_of_another_program_takes_its_own_time():
    other, ours = passes(), passes(ssd_forward_time=1, ssd_backward_time=1)
    for phase, factor in ((FORWARD, 2.3), (BACKWARD, 2.6)):
        lines = [next(line for line in p.unit("M").work[phase] if line.operation == "ssd") for p in (other, ours)]
        work = [line.seconds - (3 if phase == FORWARD else 6) * Shares().launch for line in lines]
        assert work[0] == pytest.approx(factor * work[1])


def test_sharded_parameters_are_gathered_again_unless_a_layer_does_so_itself():
    def gathered(remat: str, regathers: int) -> float:
        plan = PlanConfig(data=4, fsdp="parameters", remat=remat, attention="blocked")
        sent = passes(plan, regathers=regathers).unit("-").sent
        return sum(one.record.bytes for phase in sent.values() for one in phase if one.record.operation == "all-gather")

    assert gathered("none", 1) == 2 * gathered("none", 0) == gathered("full", 1) == gathered("full", 0)


def test_parameters_on_the_network_hide_behind_traffic_within_the_node():
    """4 s of compute, 3 s of exchanges within the node, all exposed, and 6 s of parameters between nodes: 4 behind
    compute, which they slow by 0.2, and 2 behind the exchanges."""
    of = lambda kind, link, seconds: (1, Sent(Collective("", "", "", (), 1, 0), kind, link, seconds))  # noqa: E731
    found = passes(overlap_data=1, overlap_expert=0)
    far = found.hidden(4, [of("expert", "node", 3), of("data", "network", 6)])
    assert far.exposed["expert"] == 3 and far.exposed["data"] == 0
    assert far.seconds == pytest.approx(4 + 3 + 0.2 * 4)
    near = found.hidden(4, [of("expert", "node", 3), of("data", "node", 6)])
    assert near.exposed["data"] == 2
    assert near.contended == pytest.approx(found.software.contention * 4)
