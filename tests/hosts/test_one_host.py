"""Four gunicorn workers, one webhook, the file store: once a delivery is answered nobody answers the old value."""

from __future__ import annotations

import json
import random
import sqlite3
import time
from pathlib import Path

import pytest

from external_oms.entry import SETTLING_FLOOR_SECONDS
from external_oms.testing import ConfigAPIEmulator, sign_delivery
from tests.support.servers import Gunicorn, environment, gunicorn
from tests.support.waiting import wait_until
from tests.support.web import SECRET, TENANT

EVALUATIONS = 2000


def deliver(host: Gunicorn, number: int) -> dict[str, object]:
    body = json.dumps({"tenant": TENANT, "name": "config.changed"}).encode()
    headers = sign_delivery(body, SECRET, delivery_id=f"round-{number}")
    status, answer = host.post("/webhooks/external-oms", body, headers)
    assert status in {200, 202}, answer
    return {"status": status, **answer}


def play(host: Gunicorn, api: ConfigAPIEmulator, rounds: int) -> list[int]:
    """Flip, deliver, evaluate, so many rounds; how many reads the API saw in each."""
    reads = []
    for number in range(rounds):
        enabled = not api.enabled(TENANT)
        api.set_enabled(TENANT, enabled)
        before, began = api.reads(TENANT), time.monotonic()
        answer = deliver(host, number)
        if answer["status"] == 202:  # the bucket is empty: a storm by our own making; its read follows
            wait_until(lambda: api.reads(TENANT) > before)  # noqa: B023 - called at once
            continue
        assert answer["enabled"] is enabled
        for pid, answers in host.evaluate(EVALUATIONS // 4).items():
            old = {what: count for what, count in answers.items() if what.startswith("off" if enabled else "on")}
            assert not old, f"round {number}, worker {pid}: {answers}"
        reads.append(api.reads(TENANT) - before)
        looks = 1 + int((time.monotonic() - began) / SETTLING_FLOOR_SECONDS)
        assert reads[-1] <= 1 + looks, "one read, and the looks of the settling after this round and the one before"
    return reads


@pytest.fixture
def api() -> ConfigAPIEmulator:
    return ConfigAPIEmulator((TENANT,))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("preload", [False, True], ids=["each-worker-loads", "preload"])
def test_after_a_delivery_is_answered_no_worker_answers_the_old_value(
    preload: bool, api: ConfigAPIEmulator, tmp_path: Path
) -> None:
    with (
        api,
        gunicorn(
            "tests.hosts.shop:app",
            environ=environment(api, store=f"sqlite:///{tmp_path}/state/state.db"),
            log=tmp_path / "gunicorn.log",
            preload=preload,
        ) as host,
    ):
        reads = play(host, api, rounds=5)
        assert len(reads) == 5
    assert "Traceback" not in (tmp_path / "gunicorn.log").read_text()


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("preload", [False, True], ids=["each-worker-loads", "preload"])
def test_two_hundred_rounds(preload: bool, api: ConfigAPIEmulator, tmp_path: Path) -> None:
    with (
        api,
        gunicorn(
            "tests.hosts.shop:app",
            environ=environment(api, store=f"sqlite:///{tmp_path}/state/state.db"),
            log=tmp_path / "gunicorn.log",
            preload=preload,
        ) as host,
    ):
        reads = play(host, api, rounds=200)
    print(f"rounds {len(reads)}, reads per round at most {max(reads)}, on average {sum(reads) / len(reads):.2f}")
    assert len(reads) == 200


def kill_in_every_round(host: Gunicorn, api: ConfigAPIEmulator, rounds: int, dice: random.Random) -> None:
    """A random worker is killed right after the flip; the delivery, its read and the answers must not suffer."""
    generation = 0
    for number in range(rounds):
        enabled = not api.enabled(TENANT)
        api.set_enabled(TENANT, enabled)
        host.kill(dice.choice(sorted(host.members())))
        answer = deliver(host, 10_000 + number)
        assert isinstance(answer["generation"], int)
        assert answer["generation"] > generation, "a generation was lost"
        generation = answer["generation"]
        if answer["refreshed"]:
            for pid, answers in host.evaluate(50).items():
                assert all(what.startswith("on" if enabled else "off") for what in answers), (number, pid, answers)


def assert_clean(state: Path) -> None:
    with sqlite3.connect(state) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert not list(state.parent.glob("*set-aside*"))


@pytest.mark.timeout(120)
def test_killing_a_worker_in_every_round_loses_nothing(api: ConfigAPIEmulator, tmp_path: Path) -> None:
    state = tmp_path / "state" / "state.db"
    with (
        api,
        gunicorn(
            "tests.hosts.shop:app", environ=environment(api, store=f"sqlite:///{state}"), log=tmp_path / "gunicorn.log"
        ) as host,
    ):
        kill_in_every_round(host, api, 4, random.Random(7))
    assert_clean(state)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_killing_a_worker_in_every_one_of_a_hundred_rounds(api: ConfigAPIEmulator, tmp_path: Path) -> None:
    state = tmp_path / "state" / "state.db"
    with (
        api,
        gunicorn(
            "tests.hosts.shop:app", environ=environment(api, store=f"sqlite:///{state}"), log=tmp_path / "gunicorn.log"
        ) as host,
    ):
        kill_in_every_round(host, api, 100, random.Random(11))
    assert_clean(state)
