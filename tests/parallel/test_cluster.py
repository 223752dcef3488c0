"""How a process learns which one it is, and how processes meet."""

import json
import socket
import threading
import time

import pytest

from orogen.config.checks import ConfigError
from orogen.launch.local import free_port
from orogen.parallel import roll_call
from orogen.parallel.cluster import Cluster, first_host, read_cluster
from orogen.parallel.roll_call import call_roll

STEP = {
    "SLURM_JOB_ID": "4099", "SLURM_STEP_NODELIST": "n[03-04,9]", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
}  # fmt: skip


def test_by_hand():
    assert read_cluster("h.example:123,4,3", {}) == Cluster("h.example:123", 4, 3)
    assert read_cluster("[::1]:123,1,0", {}) == Cluster("[::1]:123", 1, 0)
    assert read_cluster(None, {}) is None and read_cluster("", {}) is None


def test_slurm():
    """The port is JAX's own choice: 65535 - 4096 + 1 + the job's number mod 4096."""
    assert read_cluster("slurm", STEP) == Cluster("n03:61443", 3, 2)
    shared = {**STEP, "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_LOCALID": "1"}
    assert read_cluster("slurm", shared) == Cluster("n03:61443", 3, 2, 1)
    chosen = {**STEP, "JAX_COORDINATOR_ADDRESS": "login:77"}
    assert read_cluster("slurm", chosen).coordinator == "login:77"


def test_kubernetes():
    pod = {"JAX_COORDINATOR_ADDRESS": "a-0:1", "OROGEN_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}
    assert read_cluster("kubernetes", pod) == Cluster("a-0:1", 4, 3)


@pytest.mark.parametrize(
    ("hosts", "host"),
    [("n1", "n1"), ("a,b", "a"), ("n[1-2]", "n1"), ("gpu[007,009-12],x", "gpu007"), ("a-b[3],c", "a-b3")],
)
def test_first_host(hosts, host):
    assert first_host(hosts) == host


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("host", {}, "cluster 'host'; expected HOST:PORT,COUNT,ID, or slurm or kubernetes"),
        ("host,2,0", {}, "is 'host'; expected HOST:PORT"),
        ("host:99999,2,0", {}, "is 'host:99999'; expected HOST:PORT"),
        ("host:1,2,2", {}, "has process 2 of 2; expected a number from 0"),
        ("host:1,2,-1", {}, "expected HOST:PORT,COUNT,ID"),
        ("slurm", {}, "cluster 'slurm': SLURM_JOB_ID is not set; expected a process that slurm started"),
        ("slurm", {**STEP, "SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'; expected a whole number"),
        ("kubernetes", {}, "cluster 'kubernetes': JAX_COORDINATOR_ADDRESS is not set"),
    ],
)
def test_refusals(text, environment, message):
    with pytest.raises(ConfigError) as caught:
        read_cluster(text, environment)
    assert message in str(caught.value)


def called(*clusters: Cluster, seconds: float) -> list[str]:
    """What the roll call says to each process, all at once: an error's message, or nothing."""
    found = [""] * len(clusters)

    def call(place: int) -> None:
        try:
            call_roll(clusters[place], seconds)
        except ConfigError as error:
            found[place] = str(error)

    threads = [threading.Thread(target=call, args=(place,)) for place in range(len(clusters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def place() -> str:
    return f"127.0.0.1:{free_port()}"


def test_all_are_there(place):
    assert called(*(Cluster(place, 5, k) for k in range(5)), seconds=20) == [""] * 5


def test_process_0_may_be_the_last(place):
    late = threading.Timer(0.5, call_roll, (Cluster(place, 2, 0), 20))
    late.start()
    call_roll(Cluster(place, 2, 1), 20)
    late.join()


def test_the_missing_are_named_to_all(place):
    found = called(*(Cluster(place, 5, k) for k in (0, 1, 3)), seconds=0.7)
    assert len(set(found)) == 1
    assert found[0] == f"process 2, 4 of 5 did not start within 0.7 s; expected each to reach process 0 at {place}"


def test_an_unreachable_coordinator(place):
    began = time.monotonic()
    (said,) = called(Cluster(place, 2, 1), seconds=0.5)
    assert said == (
        f"process 1 of 2: the coordinator {place} cannot be reached (Connection refused); expected process 0 to listen "
        "there within 0.5 s"
    )
    assert time.monotonic() - began < 5


def test_a_name_that_nobody_knows():
    (said,) = called(Cluster("no-such-host.invalid:1", 2, 1), seconds=0.3)
    assert "no-such-host.invalid:1 cannot be reached" in said


def test_one_number_twice(place):
    found = called(Cluster(place, 3, 0), Cluster(place, 3, 1), Cluster(place, 3, 1), seconds=3)
    assert set(found) == {"two processes have the number 1; expected each of 0 to 2 once"}


def test_what_is_missing_may_be_there_at_another_start(place):
    with pytest.raises(roll_call.AbsentError):
        call_roll(Cluster(place, 2, 1), 0.3)
    told: list[type] = []

    def call(index: int, count: int) -> None:
        try:
            call_roll(Cluster(place, count, index), 0.7)
        except ConfigError as error:
            told.append(type(error))

    for one, other in (((0, 3), (1, 3)), ((0, 2), (1, 3))):  # process 2 is missing; two are of different runs
        thread = threading.Thread(target=call, args=other)
        thread.start()
        call(*one)
        thread.join()
    assert told == [roll_call.AbsentError] * 2 + [ConfigError] * 2


def test_another_number_of_processes(place):
    found = called(Cluster(place, 2, 0), Cluster(place, 3, 1), seconds=3)
    assert set(found) == {"process 1 was started for 3 processes; expected 2, as process 0 was"}


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[" * 5000, b'{"process": "1"}\n', b""])
def test_strangers_are_ignored(place, monkeypatch, line):
    monkeypatch.setattr(roll_call, "LINE_SECONDS", 0.2)
    first = threading.Thread(target=call_roll, args=(Cluster(place, 2, 0), 20))
    first.start()
    with _connected(place) as stranger:
        stranger.sendall(line)
        call_roll(Cluster(place, 2, 1), 20)
    first.join()


def _connected(place: str) -> socket.socket:
    host, port = place.split(":")
    while True:
        try:
            return socket.create_connection((host, int(port)))
        except ConnectionRefusedError:
            time.sleep(0.01)


def test_a_coordinator_that_is_something_else(place):
    host, port = place.split(":")
    with socket.create_server((host, int(port))) as server:
        answer = threading.Thread(target=lambda: server.accept()[0].sendall(json.dumps({"hello": 1}).encode() + b"\n"))
        answer.start()
        (said,) = called(Cluster(place, 2, 1), seconds=1)
        answer.join()
    assert "did not answer within 6 s; expected process 0 of this run there" in said


def test_a_port_that_is_taken(place):
    host, port = place.split(":")
    with socket.create_server((host, int(port))):
        (said,) = called(Cluster(place, 2, 0), seconds=1)
    assert said == f"process 0 cannot listen at {place} (Address already in use); expected a free port"
