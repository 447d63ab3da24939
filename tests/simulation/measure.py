"""What one step costs one Redis, measured on a real one: `python -m tests.simulation.measure` prints the constants.

Times are the server's own: processor time by INFO, so that neither the network nor this process is in them.
"""

from __future__ import annotations

import json
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import redis

from external_oms.clock import SYSTEM_CLOCK
from external_oms.config import Snapshot
from external_oms.stores.base import Lease, Member
from external_oms.stores.redis import RedisStore
from tests.simulation.costs import Costs
from tests.support.redis import RedisServer
from tests.support.waiting import wait_until

__all__ = ["Meter", "idle_member", "measure", "snapshot_of"]

TENANT = "tenant-0000"
ROUNDS = 5
UPDATED_AT = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


class Meter:
    """What a server has done since the last look: processor seconds, bytes, calls."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._before: dict[str, float] = self._now()
        self.since: dict[str, float] = {}

    def _now(self) -> dict[str, float]:
        cpu, stats = self._info("cpu"), self._info("stats")
        now = {
            "seconds": float(str(cpu["used_cpu_sys"])) + float(str(cpu["used_cpu_user"])),
            "in": float(str(stats["total_net_input_bytes"])),
            "out": float(str(stats["total_net_output_bytes"])),
        }
        for name, told in self._info("commandstats").items():
            assert isinstance(told, dict)
            now[name.removeprefix("cmdstat_")] = float(told["calls"])
        return now

    def _info(self, section: str) -> dict[str, object]:
        told = self._client.info(section)
        assert isinstance(told, dict)
        return told

    def look(self) -> dict[str, float]:
        """What was done since the last look; the look itself is about two hundred bytes in and some thousand out."""
        now = self._now()
        self.since = {name: value - self._before.get(name, 0.0) for name, value in now.items()}
        self._before = now
        return self.since

    def each(self, times: int, step: Callable[[], object]) -> tuple[float, float, float]:
        """Processor seconds, bytes in and bytes out of one step, from so many of them."""
        self.look()
        for _ in range(times):
            step()
        done = self.look()
        return done["seconds"] / times, done["in"] / times, done["out"] / times


def snapshot_of(lease: Lease) -> Snapshot:
    """What a read gives, as long as such a value is: with a validator and an instant of its change."""
    return Snapshot(
        enabled=True,
        updated_at=UPDATED_AT,
        etag=f'"{secrets.token_hex(8)}"',
        generation=lease.record.generation,
        read_number=lease.number,
        read_at=SYSTEM_CLOCK.monotonic(),
        fetched_at=UPDATED_AT,
        lifetime_seconds=30.0,
    )


@contextmanager
def idle_member(url: str, tenants: tuple[str, ...]) -> Iterator[RedisStore]:
    """A member without threads, so that only what it is told to do reaches the server."""
    store = RedisStore(url, tenants=tenants)
    store._follower.start = lambda: None  # type: ignore[method-assign]  # the one way to keep its threads from starting
    try:
        yield store
    finally:
        store.close()


def _subscribed(port: int, members: int) -> list[socket.socket]:
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(members)]
    for one in sockets:
        one.sendall(b"*2\r\n$9\r\nSUBSCRIBE\r\n$20\r\nexternal_oms:changes\r\n")
    for one in sockets:
        one.recv(4096)
    return sockets


def _drain(sockets: list[socket.socket], size: int) -> None:
    for one in sockets:
        left = size
        while left > 0:
            left -= len(one.recv(left))


def _copies(server: RedisServer, message: str, *, times: int = 200) -> tuple[float, float]:
    """Processor seconds of one published copy: on the server's thread inside the command, and in all."""
    inside, whole = [], []
    text = message.encode()
    frame = b"*3\r\n$7\r\nmessage\r\n$20\r\nexternal_oms:changes\r\n$%d\r\n%b\r\n" % (len(text), text)
    counts = (50, 450)
    with server.client() as client:
        for members in counts:
            sockets = _subscribed(server.port, members)
            meter = Meter(client)
            client.config_resetstat()
            meter.look()
            for _ in range(times):
                client.publish("external_oms:changes", message)
                _drain(sockets, len(frame))
            done = meter.look()
            told = client.info("commandstats")
            assert isinstance(told, dict)
            inside.append(told["cmdstat_publish"]["usec_per_call"] / 1e6)
            whole.append(done["seconds"] / times)
            for one in sockets:
                one.close()
            wait_until(lambda: client.pubsub_numsub("external_oms:changes")[0][1] == 0)
    span = counts[1] - counts[0]
    return (inside[1] - inside[0]) / span, (whole[1] - whole[0]) / span


def _message_bytes(server: RedisServer, store: RedisStore) -> tuple[str, int]:
    """A message as the fleet gets it, and its length with its frame."""
    (hearing,) = _subscribed(server.port, 1)
    lease = store.acquire(TENANT, seconds=7.0, metered=False)
    assert isinstance(lease, Lease)
    store.put(lease, snapshot_of(lease))
    frame = hearing.recv(65_536)
    hearing.close()
    return frame.split(b"\r\n")[6].decode(), len(frame)


def _looks(server: RedisServer, tenants: int, times: int) -> tuple[float, float, float, float]:
    """One look at so many stamps: the server's processor seconds, bytes in, bytes out, the member's own seconds."""
    names = tuple(f"tenant-{number:04}" for number in range(tenants))
    with idle_member(server.url, names) as store, server.client() as client:
        store._look()
        for name in names:
            store.invalidate(name)
        store._look()
        meter = Meter(client)
        began = time.thread_time()
        cost = meter.each(times, store._look)
        return *cost, (time.thread_time() - began) / times


def _hearing_seconds(store: RedisStore, message: str, times: int = 2000) -> float:
    """What it costs a member to take one message of another: its own processor seconds."""
    member, tenant, record = json.loads(message)
    texts = []
    for _ in range(times):
        record[3] = str(int(record[3]) + 1)
        texts.append(json.dumps(["another", tenant, record]))
    assert member != "another"
    began = time.thread_time()
    for text in texts:
        store._exchange.hear(text)
    return (time.thread_time() - began) / times


def measure(server: RedisServer, *, times: int = 1000) -> Costs:
    """The constants, on this machine."""
    with server.client() as client, idle_member(server.url, (TENANT,)) as store:
        store.invalidate(TENANT)
        store._look()
        meter = Meter(client)

        def read() -> None:
            lease = store.acquire(TENANT, seconds=7.0, metered=False)
            assert isinstance(lease, Lease)
            store.put(lease, snapshot_of(lease))

        message, message_bytes = _message_bytes(server, store)
        acquire = meter.each(times, lambda: store.acquire(TENANT, seconds=7.0, metered=False))  # the first gets it
        invalidate = meter.each(times, lambda: store.invalidate(TENANT))
        client.delete(f"external_oms:{{{TENANT}}}:lease")
        pair = meter.each(times, read)
        ping = meter.each(times, client.ping)
        member = Member("host-0000:12345", TENANT, 1, True, "fresh", 12.345678)
        report = meter.each(times, lambda: store.report([member]))
        many = [Member("host-0000:12345", f"tenant-{number:04}", 1, True, "fresh", 12.345678) for number in range(101)]
        report_many = meter.each(times // 10, lambda: store.report(many))
        hearing = _hearing_seconds(store, message)
    one, thousand = _looks(server, 1, times), _looks(server, 1001, times // 50)
    inside, whole = _copies(server, message)
    connection = _connection(server)
    return Costs(
        script_seconds=(invalidate[0] + pair[0]) / 3,
        refused_seconds=acquire[0],
        script_in_bytes=(acquire[1] + invalidate[1] + pair[1]) / 4,
        script_out_bytes=(acquire[2] + invalidate[2] + pair[2]) / 4,
        look_seconds=one[0] - (thousand[0] - one[0]) / 1000,
        look_in_bytes=one[1] - (thousand[1] - one[1]) / 1000,
        look_out_bytes=one[2] - (thousand[2] - one[2]) / 1000,
        stamp_seconds=(thousand[0] - one[0]) / 1000,
        stamp_in_bytes=(thousand[1] - one[1]) / 1000,
        stamp_out_bytes=(thousand[2] - one[2]) / 1000,
        copy_inside_seconds=inside,
        copy_seconds=whole,
        message_bytes=float(message_bytes),
        ping_seconds=ping[0],
        ping_bytes=ping[1],
        report_seconds=report[0] - (report_many[0] - report[0]) / 100,
        report_in_bytes=report[1] - (report_many[1] - report[1]) / 100,
        reported_seconds=(report_many[0] - report[0]) / 100,
        reported_bytes=(report_many[1] - report[1]) / 100,
        rejoin_seconds=2 * connection[0],
        connection_bytes=connection[1],
        member_look_seconds=one[3],
        member_stamp_seconds=(thousand[3] - one[3]) / 1000,
        member_message_seconds=hearing,
    )


def _connection(server: RedisServer, members: int = 400) -> tuple[float, float]:
    """Processor seconds and memory, in bytes, of one connection that subscribes."""
    with server.client() as client:
        before = client.info("memory")
        meter = Meter(client)
        sockets = _subscribed(server.port, members)
        seconds = meter.look()["seconds"]
        after = client.info("memory")
        for one in sockets:
            one.close()
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    return seconds / members, float(after["used_memory"] - before["used_memory"]) / members


def least(rounds: list[Costs]) -> Costs:
    """Of several rounds, of each the least: whatever else ran on the machine made the others more."""
    return Costs(**{name: min(getattr(costs, name) for costs in rounds) for name in asdict(rounds[0])})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        measured = RedisServer(Path(directory))
        measured.start()
        try:
            for name, value in asdict(least([measure(measured) for _ in range(ROUNDS)])).items():
                micro = name.endswith("_seconds")
                print(f"{name:24} {value * 1e6 if micro else value:10.2f} {'us' if micro else 'bytes'}")
        finally:
            measured.stop()
