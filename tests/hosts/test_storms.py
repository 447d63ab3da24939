"""Storms of deliveries and faults of the store under live processes: `external-oms serve` and evaluators beside it."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from external_oms.settings import ENV_PREFIX
from external_oms.testing import ConfigAPIEmulator
from tests.support.redis import RedisProxy, RedisServer
from tests.support.servers import Served, environment, served
from tests.support.storms import Storm, evaluators
from tests.support.web import TENANT

BOUND_SECONDS = {"sqlite": 0.0, "redis": 2.0}
"""How long a process may know nothing of an answered delivery."""


@dataclass
class Place:
    """A service, the store under it, and the storm over it."""

    storm: Storm
    environ: dict[str, str]
    directory: Path
    bound_seconds: float
    redis: RedisServer | None = None
    proxy: RedisProxy | None = None

    @property
    def server(self) -> Served:
        return self.storm.server

    @property
    def state(self) -> Path:
        return self.directory / "store" / "state.db"

    def rage(self, seconds: float, *, senders: int, fault: Callable[[Place], None] | None = None) -> None:
        """Storm for so long, with a fault in the midst, and judge."""
        logs = [self.server.log]
        with evaluators(3, environ=self.environ, place=self.directory) as processes:
            logs += [process.log for process in processes]
            with self.storm.raging(senders):
                time.sleep(seconds / 2)
                if fault is not None:
                    fault(self)
                time.sleep(seconds / 2)
            self.storm.heals()
            time.sleep(self.bound_seconds)
            answers = [process.answers() for process in processes]
        print(f"\n{sum(self.storm.statuses.values())} deliveries {dict(self.storm.statuses)}")
        print(f"{len(self.storm.flips)} flips, {self.server.api.reads()} reads")
        for log in logs:
            assert "Traceback" not in log.read_text(), log.read_text()[-4000:]
        self.storm.judge([*answers, *self.storm.answers], bound_seconds=self.bound_seconds)
        for process in answers:
            last = process[-1]
            assert (last.fresh, last.enabled) == (True, self.server.api.enabled()), last


@contextmanager
def placed(store: str, tmp_path: Path, *, workers: int = 4) -> Iterator[Place]:
    """A service over a store of that kind."""
    (tmp_path / "log").mkdir()
    redis = RedisServer(tmp_path) if store == "redis" else None
    proxy = None
    try:
        if redis is not None:
            redis.start()
            proxy = RedisProxy(redis.port)
        url = f"sqlite:///{tmp_path}/store/state.db" if proxy is None else proxy.url
        bound = {"store_bound_seconds": str(BOUND_SECONDS["redis"])}
        with ConfigAPIEmulator([TENANT]) as api:
            environ = environment(api, store=url)
            environ |= {f"{ENV_PREFIX}{name.upper()}": value for name, value in bound.items()}
            more = {"store": url, "webhook_per_minute": "100000000", **bound}
            with served(api, tmp_path / "log", workers=workers, **more) as server:
                yield Place(Storm(server), environ, tmp_path, BOUND_SECONDS[store], redis, proxy)
    finally:
        if proxy is not None:
            proxy.close()
        if redis is not None:
            redis.stop()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("store", ["sqlite", "redis"])
def test_in_a_short_storm_nothing_old_is_fresh_and_no_delivery_is_lost_or_taken_twice(
    store: str, tmp_path: Path
) -> None:
    with placed(store, tmp_path, workers=2) as place:
        place.rage(2.0, senders=20)


@pytest.mark.soak
@pytest.mark.timeout(180)
@pytest.mark.parametrize("store", ["sqlite", "redis"])
def test_two_hundred_senders_for_half_a_minute(store: str, tmp_path: Path) -> None:
    with placed(store, tmp_path) as place:
        place.rage(30.0, senders=200)
        assert place.storm.statuses[503] == 0, "no sender was kept waiting for long"
        assert not list(place.directory.rglob("*set-aside*"))


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB in the place of the store."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system of its own")
    directory = tmp_path / "store"
    directory.mkdir(mode=0o700)
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "none", str(directory)]
    if subprocess.run(mounting, check=False, capture_output=True).returncode != 0:
        pytest.skip("this container may not mount a file system")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def fill_disk(place: Place) -> None:
    filler = place.state.parent / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    before = place.storm.statuses[503]
    time.sleep(3.0)
    assert place.storm.statuses[503] > before, "no delivery was refused, so the disk was not full"
    filler.unlink()


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_a_disk_that_is_full_for_a_while(disk: Path, tmp_path: Path) -> None:
    with placed("sqlite", tmp_path) as place:
        place.bound_seconds = 1.0  # a process whose write was refused works alone, and looks every 25 ms
        place.rage(6.0, senders=20, fault=fill_disk)


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_a_service_that_starts_on_a_read_only_disk_serves_and_heals(disk: Path, tmp_path: Path) -> None:
    with ConfigAPIEmulator([TENANT], enabled=True) as api:
        store = f"sqlite:///{disk}/state.db"
        for name in ("before", "while"):
            (tmp_path / name).mkdir()
        with served(api, tmp_path / "before", store=store) as server:
            Storm(server).heals()
        remount(disk, "ro")
        with served(api, tmp_path / "while", store=store) as server:
            storm = Storm(server)
            status, answer = server.evaluate()
            assert (status, answer["value"]) == (200, api.enabled())
            with closing(server.connect()) as connection:
                assert storm.deliver(connection) == 503
            remount(disk, "rw")
            storm.heals()
            assert storm.wrong == []
            assert "Traceback" not in server.printed()


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


# -- faults in a storm ------------------------------------------------------------------------------------------------


def kill_workers(place: Place) -> None:
    place.storm.breaks = True
    dice = random.Random(3)
    for _ in range(4):
        with suppress(ProcessLookupError):
            os.kill(dice.choice(place.server.workers()), signal.SIGKILL)
        time.sleep(0.5)


def of(place: Place) -> RedisServer:
    assert place.redis is not None
    return place.redis


def freeze_redis(place: Place) -> None:
    began = time.time()
    of(place).freeze()
    time.sleep(3.0)
    of(place).thaw()
    place.storm.outages.append((began - place.bound_seconds, time.time()))


def restart_redis(place: Place) -> None:
    place.storm.loses = True
    began = time.time()
    of(place).stop()
    time.sleep(1.0)
    of(place).start()
    place.storm.outages.append((began - place.bound_seconds, time.time()))


def flush_redis(place: Place) -> None:
    place.storm.loses = True
    of(place).flush()


def deafen_redis(place: Place) -> None:
    assert place.proxy is not None
    place.proxy.deafen()


def cut_redis(place: Place) -> None:
    assert place.proxy is not None
    place.proxy.cut()


def remove_file(place: Place) -> None:
    place.storm.loses = True
    for file in place.state.parent.glob("state.db*"):
        file.unlink()


def damage_file(place: Place) -> None:
    place.storm.loses = True
    with place.state.open("r+b") as file:
        file.write(b"\xff" * 4096)


def replace_file(place: Place) -> None:
    """Put back a copy that was made a moment before, as a restored backup."""
    place.storm.loses = True
    backup = place.directory / "backup.db"
    with sqlite3.connect(place.state) as now, sqlite3.connect(backup) as copy:
        now.backup(copy)
    now.close()
    copy.close()
    backup.chmod(0o600)
    time.sleep(0.5)
    backup.replace(place.state)


FAULTS: tuple[tuple[str, Callable[[Place], None]], ...] = (
    ("sqlite", kill_workers),
    ("sqlite", remove_file),
    ("sqlite", damage_file),
    ("sqlite", replace_file),
    ("redis", kill_workers),
    ("redis", freeze_redis),
    ("redis", restart_redis),
    ("redis", flush_redis),
    ("redis", deafen_redis),
    ("redis", cut_redis),
)


@pytest.mark.soak
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("store", "fault"), FAULTS, ids=[f"{store}-{fault.__name__}" for store, fault in FAULTS])
def test_a_fault_in_a_storm_makes_nothing_old_fresh_and_heals(
    store: str, fault: Callable[[Place], None], tmp_path: Path
) -> None:
    with placed(store, tmp_path) as place:
        place.rage(6.0, senders=20, fault=fault)
