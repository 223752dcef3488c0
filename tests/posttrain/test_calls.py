"""Calls of a server that is busy, slow or away: sent again within bounds, and what is said when that is in vain."""

import contextlib
import email.utils
import http.client
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from tests.posttrain.faulty import Fault, front

from orogen.config.checks import ConfigError
from orogen.posttrain import calls
from orogen.posttrain.calls import Calls, Patience, ServerError

GOOD = Fault(status=200, text='{"good": true}')
BUSY = Fault(status=429, headers={"retry-after": "0"}, text='{"error": {"message": "the queue\\nis full"}}')


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setattr(calls, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(calls, "JITTER", 0.0)


def calls_of(server, *, timeout=5.0, deadline=20.0, retries=3):
    return Calls("RLConfig.server", server.url, "secret", Patience(timeout, deadline, retries))


@pytest.mark.parametrize(
    "fault",
    [BUSY, *(Fault(status=status) for status in sorted(calls.RETRIED)), Fault("drop"), Fault(status=200, text="[1]"),
     Fault(status=200, text="<html>"), Fault(status=200, headers={"content-length": "50"}, text='{"good": false}')],
    ids=lambda fault: f"{fault.kind}{fault.status or ''}{fault.text[:6]}",
)  # fmt: skip
def test_what_may_go_well_later_is_sent_again(fault):
    """The same body, and the answer is the one that came whole."""
    with front(faults=[fault, fault, GOOD]) as server:
        made = calls_of(server)
        assert made.post("/x", {"a": 1}) == {"good": True}
        assert server.asked == [("/x", {"a": 1})] * 3 and made.retries == 2


@pytest.mark.parametrize("kind", ["hang", "slow", "header", "chunk", "interim"])
def test_an_attempt_that_takes_too_long_is_given_up_for_another(kind):
    """Also one whose bytes trickle, so that no single read takes long."""
    with front(faults=[Fault(kind), GOOD]) as server:
        began = time.monotonic()
        assert calls_of(server, timeout=0.3).post("/x", {}) == {"good": True}
        assert 0.3 <= time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("1", 1.0, 1.9), ("Tue, 03 Jun 2008 11:05:30 GMT", 0.02, 0.9), ("soon", 0.02, 0.9), ("-5", 0.02, 0.9)],
)
def test_a_wait_is_no_shorter_than_the_server_asks_for(header, least, most):
    with front(faults=[Fault(status=503, headers={"retry-after": header}), GOOD]) as server:
        began = time.monotonic()
        calls_of(server).post("/x", {})
        assert least <= time.monotonic() - began < most


def test_a_date_to_wait_for_is_read():
    assert 7 < calls._retry_after(email.utils.formatdate(time.time() + 9, usegmt=True)) <= 9
    assert calls._retry_after("120") == 120 and calls._retry_after(None) == 0


@pytest.mark.parametrize("year", [9999, 10**4, 10**20, 0])
def test_a_date_that_cannot_be_is_none(year):
    """It ends no run by an error of its own."""
    absurd = Fault(status=503, headers={"retry-after": f"Mon, 01 Jan {year} 00:00:00 GMT"})
    with front(faults=[absurd, GOOD]) as server:
        made = calls_of(server)
        if year == 9999:
            with pytest.raises(ServerError, match="asks to wait 2.*e.11 s"):
                made.post("/x", {})
        else:
            assert made.post("/x", {}) == {"good": True}


def test_waits_double_up_to_a_bound(monkeypatch):
    waits = []
    monkeypatch.setattr(calls, "MOST_WAIT", 0.1)
    with front(faults=[Fault("drop")] * 6) as server:
        made = calls_of(server, retries=5)
        monkeypatch.setattr(made, "_sleep", lambda seconds, progress: waits.append(seconds))
        with pytest.raises(ServerError):
            made.post("/x", {})
    assert waits == [0.02, 0.04, 0.08, 0.1, 0.1]


def test_one_line_says_what_was_in_vain():
    """The number of attempts, and the last one's reason."""
    with front(faults=[Fault(status=502, text='{"error": {"message": "the queue\\nis full"}}')] * 9) as server:
        with pytest.raises(ServerError) as caught:
            calls_of(server, retries=2).post("/v1/x", {})
        assert len(server.asked) == 3
        place = f"RLConfig.server {server.url}/v1/x: given up after 3 attempts in "
    said = str(caught.value)
    assert said.startswith(place) and "status 502: the queue is full; expected an answer within 20 s and 2" in said
    assert "\n" not in said


@pytest.mark.parametrize("fault", [Fault("hang"), Fault(status=429, headers={"retry-after": "3600"})])
def test_a_call_ends_at_its_deadline(fault):
    """And at once where the server asks to wait beyond it."""
    with front(faults=[fault] * 99) as server:
        began = time.monotonic()
        with pytest.raises(
            ServerError, match=r"no answer within 0\.\d+ s; expected|asks to wait 3600 s; expected an answer within 1 s"
        ):
            calls_of(server, timeout=0.2, deadline=1, retries=99).post("/x", {})
        assert time.monotonic() - began < (2 if fault.kind == "hang" else 0.8)


def test_a_server_that_is_not_there_is_waited_for():
    """Until the deadline, not for a number of retries."""
    with front() as gone:
        pass
    made = calls_of(gone, retries=1, deadline=1.0)
    with pytest.raises(ServerError, match="ConnectionRefusedError: .*; expected an answer within 1 s$"):
        made.post("/x", {})
    assert made.retries > 2


def test_a_server_that_is_busy_or_starts_costs_no_retry(monkeypatch):
    monkeypatch.setattr(calls, "MOST_WAIT", 0.05)
    busy = [BUSY, Fault(status=503)] * 3
    with front(faults=[*busy, Fault("drop"), GOOD]) as server:
        assert calls_of(server, retries=1).post("/x", {}) == {"good": True}
    with front(faults=[*busy, Fault("drop"), *busy, Fault("drop"), GOOD]) as server:
        with pytest.raises(ServerError, match="after 14 attempts .* and 1 retry$"):
            calls_of(server, retries=1).post("/x", {})


@contextlib.contextmanager
def unreachable():
    """The URL of a server whose queue of connections is full, so that none is made and none is refused."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        time.sleep(0.1)
        yield SimpleNamespace(url=f"http://127.0.0.1:{full.getsockname()[1]}")


def test_a_connection_that_is_not_made_is_named(monkeypatch):
    """With the seconds that it took, not those of an answer."""
    monkeypatch.setattr("orogen.posttrain.exchange.CONNECT_SECONDS", 0.3)
    with unreachable() as server, pytest.raises(ServerError, match=r"the last: no connection within 0\.3 s"):
        calls_of(server, retries=0).post("/x", {})
    monkeypatch.undo()
    with unreachable() as server, pytest.raises(ServerError, match=r"the last: no connection within 0\.4\d* s"):
        calls_of(server, retries=0, timeout=0.4).post("/x", {})


def test_progress_is_told_while_a_server_hangs_and_between_attempts():
    """What it raises ends the call."""
    told = []
    for fault in (Fault("hang"), Fault(status=503, headers={"retry-after": "1"})):
        with front(faults=[fault, GOOD]) as server:
            before = len(told)
            calls_of(server, timeout=1.0).post("/x", {}, progress=lambda: told.append(0))
            assert 4 <= len(told) - before <= 20

    def ends():
        raise KeyError("over")

    began = time.monotonic()
    with front(faults=[Fault("hang")]) as server, pytest.raises(KeyError, match="over"):
        calls_of(server).post("/x", {}, progress=ends)
    assert time.monotonic() - began < 2


def test_a_socket_that_is_closed_with_the_last_byte_is_no_failure(monkeypatch):
    """As of Python 3.13, here on any: `read1` closes the connection once it has read all."""
    read1 = http.client.HTTPResponse.read1

    def closing(self, n=-1):
        found = read1(self, n)
        if self.length == 0:
            self._close_conn()
        return found

    monkeypatch.setattr(http.client.HTTPResponse, "read1", closing)
    closes = Fault(status=200, headers={"connection": "close"}, text='{"good": true}')
    with front(faults=[closes]) as server:
        assert calls_of(server, retries=0).post("/x", {}) == {"good": True}


@pytest.mark.parametrize(
    ("status", "kind"), [(400, ConfigError), (401, ConfigError), (404, ConfigError), (500, OSError)]
)
def test_what_is_refused_for_good_is_asked_once(status, kind):
    with front(faults=[Fault(status=status, text='{"error": {"message": "no"}}'), GOOD]) as server:
        with pytest.raises(kind, match=f"answers /x with {status}: no"):
            calls_of(server).post("/x", {})
        assert len(server.asked) == 1


def test_an_answer_that_is_refused_is_asked_for_again():
    odd = Fault(status=200, text='{"version": 1}')
    with front(faults=[odd, GOOD]) as server:
        made = calls_of(server)
        assert made.post("/x", {}, check=lambda found, _: "odd" if "version" in found else None) == {"good": True}
        assert made.retries == 1
    with front(faults=[odd] * 5) as server, pytest.raises(ServerError, match="the last: odd; expected"):
        calls_of(server).post("/x", {}, check=lambda found, attempt: "odd")


@pytest.mark.parametrize("fault", [Fault("hang"), Fault(status=429, headers={"retry-after": "15"}), None])
def test_what_is_under_way_ends_when_it_is_given_up(fault):
    """No server that hangs, no wait and no connection in the making is waited for."""
    with unreachable() if fault is None else front(faults=[fault, GOOD]) as server:
        made, found = calls_of(server), []

        def ask():
            try:
                made.post("/x", {})
            except ServerError as error:
                found.append(str(error))

        thread = threading.Thread(target=ask)
        thread.start()
        while fault is not None and not server.asked:
            time.sleep(0.01)
        time.sleep(0.1)
        made.give_up()
        thread.join(3)
        assert not thread.is_alive() and "ended by us after" in found[0]
        made.go_on()
        if fault is not None:
            assert made.post("/x", {}) == {"good": True}
