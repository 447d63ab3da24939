"""OFREP over real workers: against a route that does nothing, and beside 500 open event streams."""

from __future__ import annotations

import selectors
import socket
import sys
import time
from pathlib import Path

import pytest

from external_oms.settings import Settings
from external_oms.testing import ConfigAPIEmulator
from external_oms.web.serving import THREADS
from tests.benchmarks.load import Load, load, request_for
from tests.support.servers import FLAG_PATH, Served, served
from tests.support.web import KEYS, TENANT

ONE = request_for("POST", FLAG_PATH, KEYS["viewer"], b'{"context":{"targetingKey":"order-17"}}')
BARE = (sys.executable, "-m", "gunicorn", "tests.benchmarks.bare_route:app", "--worker-class", "gthread")
STREAMS = 500
ROUNDS = 15
SECONDS = 0.7


def best(loads: list[Load]) -> Load:
    return max(loads, key=lambda one: one.per_second)


@pytest.mark.timeout(180)
def test_one_evaluation_costs_little_more_than_an_empty_route(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "bare").mkdir()
    threads = THREADS + Settings.model_fields["max_streams"].get_default()
    bare_command = (
        *BARE,
        "--threads",
        str(threads),
        "--worker-connections",
        str(threads + 1000),
        "--no-control-socket",
    )
    with ConfigAPIEmulator([TENANT]) as api, served(api, tmp_path / "ours") as ours:
        size = str(len(answer_of(ours)))
        with served(api, tmp_path / "bare", command=bare_command, bare_bytes=size) as bare:
            assert len(answer_of(bare)) == int(size)
            taken: dict[str, list[Load]] = {"bare": [], "ours": []}
            for _ in range(ROUNDS):  # turn about, so that whatever else the machine does falls on both
                taken["bare"].append(load(bare.port, ONE, SECONDS))
                taken["ours"].append(load(ours.port, ONE, SECONDS))
    ratio = best(taken["ours"]).per_second / best(taken["bare"]).per_second
    print(f"\nbare route {best(taken['bare'])}\nevaluation {best(taken['ours'])}\nratio {ratio:.3f}")
    assert ratio >= 0.9


def answer_of(server: Served) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), 10) as line:
        line.sendall(ONE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        received = b""
        while more := line.recv(65_536):
            received += more
    return received.partition(b"\r\n\r\n")[2]


@pytest.mark.timeout(180)
def test_500_streams_cost_evaluations_nothing_and_all_hear_at_once(tmp_path: Path) -> None:
    with ConfigAPIEmulator([TENANT]) as api, served(api, tmp_path) as server:
        server.flip(True)
        load(server.port, ONE, 2.0)
        alone, before = best([load(server.port, ONE, 1.0) for _ in range(5)]), memory(server)
        streams = open_streams(server)
        beside, after = best([load(server.port, ONE, 1.0) for _ in range(5)]), memory(server)
        delays = [heard_after(server, streams, enabled) for enabled in (False, True, False)]
        for stream in streams:
            stream.close()
    ratio = beside.per_second / alone.per_second
    print(
        f"\nalone              {alone}, {before} MB\nbeside {STREAMS} streams {beside}, {after} MB\nratio {ratio:.3f}"
    )
    for times in delays:
        first, middle, last = (round(times[place] * 1000) for place in (0, len(times) // 2, -1))
        print(f"after the delivery's answer: first stream {first} ms, half of them {middle} ms, the last {last} ms")
    assert ratio >= 0.6, "a thread that waits takes no time"
    assert max(max(times) for times in delays) < 2.0


def open_streams(server: Served) -> list[socket.socket]:
    streams = []
    for _ in range(STREAMS):
        line = socket.create_connection(("127.0.0.1", server.port), 20)
        line.sendall(request_for("GET", "/ofrep/v1/events", KEYS["viewer"]))
        streams.append(line)
    for opened in streams:
        received = b""
        while b"\nid: " not in received:
            more = opened.recv(65_536)
            assert more, received
            received += more
        assert received.startswith(b"HTTP/1.1 200"), received[:200]
    return streams


def heard_after(server: Served, streams: list[socket.socket], enabled: bool) -> list[float]:
    """How long after the delivery's answer each stream had its event, in seconds; 0 where it came before."""
    waiting = selectors.DefaultSelector()
    for stream in streams:
        waiting.register(stream, selectors.EVENT_READ)
    answered = server.flip(enabled)
    heard: dict[int, float] = {}
    until = time.monotonic() + 20
    while len(heard) < len(streams):
        assert time.monotonic() < until, f"{len(heard)} of {len(streams)} streams heard"
        for key, _ in waiting.select(1.0):
            line = key.fileobj
            assert isinstance(line, socket.socket)
            if b"refetchEvaluation" in line.recv(65_536):
                heard[key.fd] = max(0.0, time.time() - answered)
                waiting.unregister(line)
    return sorted(heard.values())


def memory(server: Served) -> int:
    """What the workers hold, in MB."""
    total = 0
    for pid in server.workers():
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            total += int(line.split()[1]) if line.startswith("VmRSS") else 0
    return total // 1024
