"""The tables of docs/scale.md, each from its own seed: the same command prints the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from external_oms.stores.redis import RedisStore
from tests.simulation.alone import outage
from tests.simulation.costs import MEASURED, Load, Steady, steady_load
from tests.simulation.fleet import Api, Fleet, answering, hanging, refusing
from tests.support.scripted import WINDOWS

__all__ = ["SIZES", "TABLES", "Table", "fleet_of", "markdown"]

SEED = 20_261_123
SIZES = (10, 1_000, 10_000, 100_000)
TENANTS = (1, 100, 10_000)
LARGE = 100_000
HALF = 0.5
"""How much of one processor a Redis should be at work in steady state: the rest is for the moments."""

FAN_OUT_SECONDS = 0.25
"""How long one message may take to leave: everything else waits meanwhile, and gives up after a second."""

Rows = Iterator[Sequence[str]]
Table = tuple[str, Sequence[str], Callable[[Iterable[int]], Rows]]


def fleet_of(members: int, tenants: int = 1) -> Steady:
    """The fleet of a row: the default bound; for the largest a longer one, or Redis were busy with looks alone."""
    return Steady(members, tenants, bound_seconds=30.0 if members >= LARGE else 5.0)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table, line by line."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' ---: |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}" if number >= 0.95 else f"{number:.2g}"


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def _share(part: float) -> str:
    return f"{part:.1%}" if part < 0.1 else f"{part:.0%}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"


def _at(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def _load(members: int, tenants: int) -> Load:
    return steady_load(fleet_of(members, tenants))


def steady(sizes: Iterable[int]) -> Rows:
    for members in sizes:
        for tenants in TENANTS:
            load = _load(members, tenants)
            yield (
                f"{members:,}",
                f"{tenants:,}",
                f"{load.connections:,}",
                _count(load.commands),
                _count(load.stamps),
                _count(load.copies),
                _bytes(load.in_bytes),
                _bytes(load.out_bytes),
                _count(load.reads),
                _share(load.share),
                _share(load.member_share),
            )


def _simulated(members: int, api: Api = answering, more: float = 0.0) -> Fleet:
    """A tenant's fleet; its Redis does the rest of its work beside, or nothing where that alone is too much."""
    share = _load(members, 1).share
    return Fleet(members, seed=SEED, api=api, share=share + more if share <= HALF else 0.0)


def _sized(members: int) -> str:
    return f"{members:,}" if _load(members, 1).share <= HALF else f"{members:,} *"


def meeting(sizes: Iterable[int]) -> Rows:
    for members in sizes:
        fleet = _simulated(members)
        fleet.run(300.0)
        lifetimes = 300.0 / fleet_of(members).lifetime_seconds
        yield (
            _sized(members),
            f"{len(fleet.reads) / lifetimes:.2f}",
            _count(fleet.counts["asks"] / len(fleet.reads)),
            _count((fleet.counts["stores"] + fleet.counts["releases"]) / len(fleet.reads)),
            _milliseconds(fleet.server.longest_queue_seconds),
        )


def delivery(sizes: Iterable[int]) -> Rows:
    for members in sizes:
        reports = members * MEASURED.report_seconds / RedisStore.spread_seconds
        fleet = _simulated(members, more=min(reports, HALF))
        delivered = fleet.deliver(10.0, members // 2)
        fleet.run(13.0)
        served = sorted(moment - delivered.came for moment in delivered.served)
        asks = sum(10.0 <= moment <= 10.0 + served[-1] for moment in fleet.asked_at)
        answered = (delivered.answered or 0.0) - delivered.came
        yield (
            _sized(members),
            _share(_load(members, 1).share + reports),
            _count(asks),
            f"{2 * members:,}",
            _bytes(2 * members * MEASURED.message_bytes),
            _milliseconds(answered),
            *(_milliseconds(_at(served, part)) for part in (0.5, 0.99, 1.0)),
            _milliseconds(max(0.0, served[-1] - answered)),
        )


def api_outage(sizes: Iterable[int]) -> Rows:
    for members in sizes:
        for name, api in (("refuses", refusing), ("hangs", hanging)):
            if members >= LARGE:
                continue  # when it hangs, everybody asks for the lease: see the text
            minutes = 2.0 if members > 1_000 or (name == "hangs" and members > 10) else 60.0
            fleet = _simulated(members, api)
            fleet.run(minutes * 60.0)
            yield (
                f"{members:,}",
                name,
                f"{minutes:.0f} min",
                f"{len(fleet.reads)}",
                f"{len(fleet.reads) / minutes:.1f}",
                _count(fleet.counts["asks"] / len(fleet.reads)),
                _milliseconds(fleet.server.longest_queue_seconds),
            )


def redis_outage(sizes: Iterable[int]) -> Rows:
    for members in sizes:
        told = outage(members, seed=SEED)
        together = outage(members, seed=SEED, parting=False)
        seconds = told.reads[-1] - told.reads[0]
        work = members * (MEASURED.look_seconds + MEASURED.stamp_seconds + MEASURED.script_seconds)
        work += members * MEASURED.rejoin_seconds
        yield (
            f"{members:,}",
            _count(members / WINDOWS.ttl_seconds),
            _count(len(told.reads) / seconds),
            f"{told.most_in_a_second:,}",
            f"{together.most_in_a_second:,}",
            f"{told.accepted}",
            f"{work:.2f} s",
        )


def ends(_sizes: Iterable[int]) -> Rows:
    for tenants in (1, 10, 100, 1_000, 10_000):
        row = [f"{tenants:,}"]
        for bound_seconds in (5.0, 30.0):
            members = 1
            while True:
                load = steady_load(Steady(round(members * 1.05) + 1, tenants, bound_seconds=bound_seconds, asks=3.0))
                if load.share > HALF or load.fan_out_seconds > FAN_OUT_SECONDS:
                    break
                members = round(members * 1.05) + 1
            load = steady_load(Steady(members, tenants, bound_seconds=bound_seconds, asks=3.0))
            row += [f"{float(f'{members:.2g}'):,.0f}", _bytes(load.in_bytes + load.out_bytes)]
        yield row


TABLES: Sequence[Table] = (
    (
        "steady",
        (
            "members",
            "tenants",
            "connections",
            "commands/s",
            "stamps/s",
            "messages/s",
            "in/s",
            "out/s",
            "reads/s",
            "Redis",
            "each member",
        ),
        steady,
    ),
    ("meeting", ("members", "reads per lifetime", "asks per read", "changes per read", "longest queue"), meeting),
    (
        "delivery",
        (
            "members",
            "Redis beside",
            "asks",
            "messages",
            "bytes",
            "answered",
            "half serve it",
            "99 % serve it",
            "all serve it",
            "last after the answer",
        ),
        delivery,
    ),
    (
        "API outage",
        ("members", "the API", "for", "reads", "reads/min", "asks per read", "longest queue"),
        api_outage,
    ),
    (
        "Redis outage",
        (
            "members",
            "members / ttl",
            "reads/s",
            "busiest second",
            "busiest, did they not part",
            "messages at the return",
            "work at the return",
        ),
        redis_outage,
    ),
    ("ends", ("tenants", "members, bound 5 s", "bytes/s", "members, bound 30 s", "bytes/s"), ends),
)
"""Name, head and rows of each table."""
