"""Event streams over real connections, on real workers: what they hold, whom they reach, and how they end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from external_oms.emulator import ConfigAPIEmulator
from external_oms.web.serving import MEMBER_HEADER
from tests.support.servers import SERVE, Served, served
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from tests.support.web import KEYS, TENANT


class Stream:
    """One open stream; closed after the test."""

    opened: ClassVar[list[http.client.HTTPConnection]] = []
    answers: ClassVar[list[http.client.HTTPResponse]] = []

    def __init__(self, server: Served, last_id: str = "") -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_SECONDS)
        headers = {"X-API-Key": KEYS["viewer"], **({"Last-Event-ID": last_id} if last_id else {})}
        self.connection.request("GET", "/ofrep/v1/events", headers=headers)
        self.answer = self.connection.getresponse()
        self.answers.append(self.answer)
        self.status = self.answer.status
        self.member = self.answer.headers[MEMBER_HEADER] or ""
        self.last_id = last_id
        self.opened.append(self.connection)

    def line(self, start: str) -> str:
        """The rest of the next line that begins so; empty where the stream ended first."""
        for raw in self.answer:
            text = raw.decode().rstrip("\n")
            if text.startswith("id: "):
                self.last_id = text.removeprefix("id: ")
            if text.startswith(start):
                return text.removeprefix(start)
        return ""

    def heard(self) -> bool:
        """Whether an event came, and not the end."""
        data = self.line("data: ")
        return bool(data) and json.loads(data)["type"] == "refetchEvaluation"


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    for answer in Stream.answers:
        answer.close()
    for connection in Stream.opened:
        connection.close()
    Stream.answers.clear()
    Stream.opened.clear()


@pytest.fixture
def api() -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator([TENANT]) as emulator:
        yield emulator


def on_every_worker(server: Served, number: int) -> list[Stream]:
    """So many streams, and more until every worker holds one."""
    streams: list[Stream] = []

    def enough() -> bool:
        stream = Stream(server)
        assert stream.status == 200
        assert stream.line("id: ")
        streams.append(stream)
        return len(streams) >= number and len({stream.member for stream in streams}) == len(server.workers())

    wait_until(enough)
    return streams


def test_every_stream_hears_of_a_flip_on_whichever_worker_it_is_held(api: ConfigAPIEmulator, tmp_path: Path) -> None:
    with served(api, tmp_path, command=(*SERVE, "--name-members")) as server:
        streams = on_every_worker(server, 6)
        for enabled in (True, False):
            server.flip(enabled)
            assert all(stream.heard() for stream in streams)
        # a worker dies; who listened there comes back on another, and is told what it missed meanwhile
        lost = streams[0]
        os.kill(int(lost.member.rpartition(":")[2]), signal.SIGKILL)
        assert not lost.heard()
        server.flip(True)
        assert Stream(server, lost.last_id).heard()


def test_streams_leave_evaluations_their_threads(api: ConfigAPIEmulator, tmp_path: Path) -> None:
    narrow = (*SERVE, "--threads", "1")
    with served(api, tmp_path, workers=1, command=narrow, max_streams="3") as server:
        streams = [Stream(server) for _ in range(3)]
        assert [stream.status for stream in streams] == [200, 200, 200]
        refused = Stream(server)
        assert (refused.status, refused.answer.headers["Retry-After"]) == (503, "10")
        assert json.loads(refused.answer.read())["errorCode"] == "GENERAL"
        refused.connection.close()
        for _ in range(20):
            assert server.evaluate()[0] == 200


def test_open_streams_do_not_keep_a_server_from_ending(api: ConfigAPIEmulator, tmp_path: Path) -> None:
    heard: list[bool] = []

    def listen(stream: Stream) -> None:
        heard.append(stream.heard())
        stream.connection.close()  # as EventSource does, before it connects again

    patient = (
        "from external_oms.web import serving; serving.GRACE_SECONDS = 600; from external_oms.cli import main; main()"
    )
    with served(api, tmp_path, command=(sys.executable, "-c", patient, "serve")) as server:
        listening = [threading.Thread(target=listen, args=(Stream(server),)) for _ in range(8)]
        for thread in listening:
            thread.start()
        server.process.terminate()
        server.process.wait(PATIENCE_SECONDS)  # and not ten minutes, as long as a stream may go on
        for thread in listening:
            thread.join(PATIENCE_SECONDS)
        assert heard == [False] * 8
