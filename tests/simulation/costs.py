"""What is linear in a fleet: so many members, tenants and seconds, times what one step costs one Redis. Pure.

Linear are the looks, the PINGs, the reports and, because tenants are independent, everything that one tenant's reads
cause. What is not linear, because members meet, is in `tests.simulation.fleet`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from external_oms.freshness import early_seconds
from external_oms.judgement import SHORT_SECONDS
from external_oms.members import MOST_SECONDS
from external_oms.stores.redis_follow import LOOK, SILENCE, SLICE_SECONDS, timeout_of

__all__ = ["MEASURED", "Costs", "Load", "Steady", "steady_load"]

CONNECTIONS = 2
"""Of one member: one for questions, one for the subscription. More readers at work at once open more for a while."""

REPORT_SECONDS = 0.9 * MOST_SECONDS
"""The mean time between two reports: a member draws it between eight and ten tenths of the most."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What one step costs; seconds are the server's processor time, the two last groups aside.

    Attributes:
        script_seconds: A script that changes a record, the fan-out aside.
        refused_seconds: A script that changes nothing: the lease is busy.
        script_in_bytes: A script's question.
        script_out_bytes: A script's answer.
        look_seconds: A look at the stamps, the stamps aside.
        look_in_bytes: Its question, likewise.
        look_out_bytes: Its answer, likewise.
        stamp_seconds: One tenant's stamp in a look.
        stamp_in_bytes: Its part of the question.
        stamp_out_bytes: Its part of the answer.
        copy_inside_seconds: One published copy, within the command that publishes.
        copy_seconds: The same in all, with its way out of the server.
        message_bytes: One published copy.
        ping_seconds: A PING.
        ping_bytes: It, and as much again its answer.
        report_seconds: A member's report, its tenants aside.
        report_in_bytes: Its length, likewise.
        reported_seconds: One tenant in a report.
        reported_bytes: Its length.
        rejoin_seconds: A member's two new connections, its subscription among them.
        connection_bytes: The server's memory for a connection that has just been used.
        member_look_seconds: A look, for the member's own processor, with one tenant.
        member_stamp_seconds: Each further tenant of a look, likewise.
        member_message_seconds: Hearing of a change, likewise.
    """

    script_seconds: float
    refused_seconds: float
    script_in_bytes: float
    script_out_bytes: float
    look_seconds: float
    look_in_bytes: float
    look_out_bytes: float
    stamp_seconds: float
    stamp_in_bytes: float
    stamp_out_bytes: float
    copy_inside_seconds: float
    copy_seconds: float
    message_bytes: float
    ping_seconds: float
    ping_bytes: float
    report_seconds: float
    report_in_bytes: float
    reported_seconds: float
    reported_bytes: float
    rejoin_seconds: float
    connection_bytes: float
    member_look_seconds: float
    member_stamp_seconds: float
    member_message_seconds: float


MEASURED = Costs(
    script_seconds=58e-6,
    refused_seconds=45e-6,
    script_in_bytes=430.0,
    script_out_bytes=410.0,
    look_seconds=46e-6,
    look_in_bytes=74.0,
    look_out_bytes=34.0,
    stamp_seconds=3.2e-6,
    stamp_in_bytes=82.0,
    stamp_out_bytes=0.2,
    copy_inside_seconds=0.7e-6,
    copy_seconds=5.9e-6,
    message_bytes=456.0,
    ping_seconds=15e-6,
    ping_bytes=14.0,
    report_seconds=50e-6,
    report_in_bytes=194.0,
    reported_seconds=1.1e-6,
    reported_bytes=157.0,
    rejoin_seconds=62e-6,
    connection_bytes=38_000.0,
    member_look_seconds=141e-6,
    member_stamp_seconds=8.7e-6,
    member_message_seconds=21e-6,
)
"""As `python -m tests.simulation.measure` printed them on a virtual x86-64 server with two cores (AMD EPYC), Redis 7.0,
CPython 3.11, over loopback. Another machine has others; the shape of the tables stays."""


@dataclass(frozen=True, slots=True)
class Steady:
    """A fleet in which nothing happens but time.

    Attributes:
        members: Processes, each with the same tenants.
        tenants: Tenants that each of them serves.
        ttl_seconds: The freshness lifetime.
        bound_seconds: The longest that a lost message stays unnoticed.
        asks: Questions for the lease per lifetime; more than one where members meet.
        reports: Whether members report what they serve.
    """

    members: int
    tenants: int
    ttl_seconds: float = 30.0
    bound_seconds: float = 5.0
    asks: float = 1.0
    reports: bool = True

    @property
    def lifetime_seconds(self) -> float:
        """From one read of a tenant to the next: the lifetime, less how early the first of the members is.

        The first of n exponential draws is expected at their mean times the n-th harmonic number.
        """
        alone = self.members == 1 or self.ttl_seconds < SHORT_SECONDS  # then whoever read last reads next
        harmonic = 1.0 if alone else math.log(self.members) + 0.5772 + 1 / (2 * self.members)
        return self.ttl_seconds - early_seconds(self.ttl_seconds, -math.expm1(-harmonic))

    @property
    def look_interval_seconds(self) -> float:
        """From one look of a member to the next."""
        return self.bound_seconds * sum(LOOK) / 2

    @property
    def quiet_seconds(self) -> float:
        """How long a subscription is silent before its PING: the wait is cut into slices, and ends with one."""
        slice_seconds = min(SLICE_SECONDS, timeout_of(self.bound_seconds) / 2)
        return slice_seconds * math.ceil(SILENCE * self.bound_seconds / slice_seconds)

    @property
    def pings_per_second(self) -> float:
        """PINGs of one member: as many as fit between two messages, which come once per lifetime and tenant."""
        between = self.lifetime_seconds / self.tenants
        return math.floor(between / self.quiet_seconds) / between


@dataclass(frozen=True, slots=True)
class Load:
    """What a fleet asks of Redis, of the API, and of itself; per second, where it does not say otherwise.

    Attributes:
        connections: To Redis, at any time.
        memory_bytes: What these take of the server, at the most.
        reads: Reads of the API.
        scripts: Scripts on records: for the lease, and to store what was read.
        looks: Looks at all stamps, each of one question and one stamp per tenant.
        stamps: Stamps looked at.
        pings: PINGs.
        reports: Reports of members.
        copies: Published copies that leave the server.
        in_bytes: To the server.
        out_bytes: From the server.
        share: Of one processor of the server; Redis runs commands on one.
        member_share: Of one processor of a member.
        fan_out_seconds: How long the server takes to send one message to everybody.
    """

    connections: int
    memory_bytes: float
    reads: float
    scripts: float
    looks: float
    stamps: float
    pings: float
    reports: float
    copies: float
    in_bytes: float
    out_bytes: float
    share: float
    member_share: float
    fan_out_seconds: float

    @property
    def commands(self) -> float:
        """Questions that reach the server, a look counted once."""
        return self.scripts + self.looks + self.pings + self.reports


def steady_load(fleet: Steady, costs: Costs = MEASURED) -> Load:
    """What the fleet costs while nothing happens but time."""
    members, tenants = fleet.members, fleet.tenants
    reads = tenants / fleet.lifetime_seconds
    scripts = reads * (fleet.asks + 1.0)
    looks = members / fleet.look_interval_seconds
    stamps = looks * tenants
    pings = members * fleet.pings_per_second
    reports = members / REPORT_SECONDS if fleet.reports else 0.0
    copies = reads * members
    share = (
        reads * 2 * costs.script_seconds
        + reads * (fleet.asks - 1.0) * costs.refused_seconds
        + looks * costs.look_seconds
        + stamps * costs.stamp_seconds
        + pings * costs.ping_seconds
        + reports * (costs.report_seconds + tenants * costs.reported_seconds)
        + copies * costs.copy_seconds
    )
    own = (looks * costs.member_look_seconds + stamps * costs.member_stamp_seconds) / members
    return Load(
        connections=CONNECTIONS * members,
        memory_bytes=CONNECTIONS * members * costs.connection_bytes,
        reads=reads,
        scripts=scripts,
        looks=looks,
        stamps=stamps,
        pings=pings,
        reports=reports,
        copies=copies,
        in_bytes=scripts * costs.script_in_bytes
        + looks * costs.look_in_bytes
        + stamps * costs.stamp_in_bytes
        + pings * costs.ping_bytes
        + reports * (costs.report_in_bytes + tenants * costs.reported_bytes),
        out_bytes=scripts * costs.script_out_bytes
        + looks * costs.look_out_bytes
        + stamps * costs.stamp_out_bytes
        + pings * costs.ping_bytes
        + copies * costs.message_bytes,
        share=share,
        member_share=own + reads * costs.member_message_seconds,
        fan_out_seconds=members * costs.copy_seconds,
    )
