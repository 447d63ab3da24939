"""Every question to Redis says what this process knows and owes, and every answer goes through the mirror."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from external_oms.clock import Clock
from external_oms.config import Failure, Snapshot
from external_oms.stores.redis_client import Client
from external_oms.stores.redis_link import Away, Link
from external_oms.stores.redis_mirror import Debt, Mirror, Verdict
from external_oms.stores.redis_scripts import NOW, STAMPS, TOUCH, Script
from external_oms.stores.redis_wire import (
    STRANGE,
    Remote,
    Reply,
    ServerClock,
    Stamp,
    decode_answer,
    decode_differing,
    decode_message,
    decode_remote,
    decode_stamp,
    encode_failure,
    encode_snapshot,
)

__all__ = ["LIFE_SECONDS", "Exchange", "milliseconds"]

LIFE_SECONDS = 30 * 86_400.0
"""How long a tenant's record outlives its last use: longer than any outage or holiday, so that the last known value is
there after it; and a tenant that was taken out of the configuration leaves nothing behind for ever."""

STAMPS_AT_ONCE = 1000
"""Stamps compared by one call: about two milliseconds in which Redis serves nobody else."""

CALLS_AT_ONCE = 500
"""Records brought in step per round trip: enough to hide it, few enough that Redis serves others in between."""


def milliseconds(seconds: float) -> str:
    """A life as Redis wants it; at least one, for zero would be no life at all."""
    return str(max(1, round(seconds * 1000)))


class Exchange:
    """Questions and answers about the records of one process.

    Args:
        link: The line to Redis.
        mirror: What this process knows.
        prefix: What every key begins with.
        clock: What tells the time.
        wake: Called where Redis must be looked at again.
    """

    def __init__(self, *, link: Link, mirror: Mirror, prefix: str, clock: Clock, wake: Callable[[], None]) -> None:
        self._link = link
        self._mirror = mirror
        self._prefix = prefix
        self._clock = clock
        self._wake = wake
        self._clocks: dict[str, ServerClock] = {}
        self.channel = f"{prefix}:changes"
        self.after_fork()

    def after_fork(self) -> None:
        """Another process is another member; the difference of the clocks stays what it was."""
        self._member = secrets.token_hex(8)

    def key(self, tenant: str, name: str) -> str:
        """A key of a tenant, under its hash tag."""
        return f"{self._prefix}:{{{tenant}}}:{name}"

    def _clock_of(self, tenant: str) -> ServerClock:
        """The clock of the server that keeps the tenant: in a cluster every node has one of its own."""
        node = self._link.node_of(self.key(tenant, "record"))
        return self._clocks.setdefault(node, ServerClock())

    def encode(self, tenant: str, outcome: Snapshot | Failure) -> str | None:
        """What a read gave, for Redis; None while its clock is not known."""
        clock = self._clock_of(tenant)
        if not clock.is_set:
            return None
        if isinstance(outcome, Snapshot):
            return encode_snapshot(outcome, member=self._member, clock=clock)
        return encode_failure(outcome, clock=clock)

    # -- one tenant -----------------------------------------------------------------------------------------------

    def ask(
        self,
        script: Script,
        tenant: str,
        *arguments: str,
        keys: Sequence[str] = (),
        own: Snapshot | Failure | None = None,
    ) -> tuple[Remote, Verdict, Reply]:
        """Run a script on a tenant's record and settle what it answers.

        Args:
            script: One of those that begin with the common prologue.
            tenant: The tenant.
            arguments: The script's own arguments.
            keys: The script's own keys.
            own: What it stores.

        Returns:
            The record in Redis after it, what that was to the mirror, and the script's own outcome.

        Raises:
            Away: Redis cannot be asked; the mirror is as it was.
        """
        debt = self._mirror.debt(tenant)
        sent = self._clock.monotonic()
        reply = self._link.run(script, self._keys(tenant, keys), [*self._known(tenant, debt), *arguments])
        return self._settle(tenant, reply, debt, sent=sent, own=own)

    def _keys(self, tenant: str, more: Sequence[str] = ()) -> list[str]:
        return [self.key(tenant, "record"), self.key(tenant, "lease"), *more]

    def _known(self, tenant: str, debt: Debt) -> list[str]:
        """The arguments that every script on a record begins with."""
        offer = debt.offer and self.encode(tenant, debt.offer)
        return [
            tenant,
            self.channel,
            self._member,
            milliseconds(LIFE_SECONDS),
            secrets.token_hex(8),  # the epoch, should the record be born now
            debt.stamp.epoch,
            str(debt.stamp.generation),
            str(debt.stamp.revision),
            str(debt.reads),
            "1" if debt.owes else "0",
            offer or "",
        ]

    def _settle(
        self, tenant: str, reply: Reply, debt: Debt, *, sent: float, own: Snapshot | Failure | None = None
    ) -> tuple[Remote, Verdict, Reply]:
        """Take what a script answered; whatever its shape is, for it comes from outside."""
        received = self._clock.monotonic()
        clock = self._clock_of(tenant)
        try:
            parts, outcome = decode_answer(reply)
            clock.note(sent, received, int(parts[0]))
            remote = decode_remote(parts, member=self._member, now=received, clock=clock)
        except STRANGE as error:
            self._link.fail(error)
            raise Away from error
        verdict = self._mirror.settle(tenant, remote, debt, own=own)
        if verdict in {Verdict.LOST, Verdict.ASK}:
            self._wake()
        return remote, verdict, outcome

    # -- the fleet ------------------------------------------------------------------------------------------------

    def hear(self, text: str) -> None:
        """Take a message of the fleet's channel, which carries the whole record: no question follows it."""
        try:
            message = decode_message(text)
            if message.member == self._member or not self._mirror.knows(message.tenant):
                return
            clock = self._clock_of(message.tenant)
            if not clock.is_set:
                self._wake()
                return
            remote = decode_remote(message.parts, member=self._member, now=self._clock.monotonic(), clock=clock)
        except STRANGE:
            return  # whatever it was meant to say, the next look shows
        if self._mirror.settle(message.tenant, remote, None) in {Verdict.LOST, Verdict.ASK}:
            self._wake()

    def look(self) -> None:
        """Compare every stamp with Redis, in one round trip; bring in step what differs, pay what is owed.

        Raises:
            Away: Redis cannot be asked; what was settled until then stays settled.
        """
        debts = {tenant: self._mirror.debt(tenant) for tenant in self._mirror.tenants}
        if not debts:  # no tenant was asked for yet, and whether Redis answers is to be known all the same
            self._link.run(NOW, [self.channel], (), probing=True)
            return
        stamps = {tenant: debt.stamp for tenant, debt in debts.items()}
        seen = self._stamps_apart(stamps) if self._link.is_cluster() else self._stamps(stamps)
        differing = []
        for tenant, debt in debts.items():
            stamp = seen.get(tenant, debt.stamp)
            never = not stamp.epoch and not debt.stamp.epoch  # nobody has used it yet
            if debt.owes or debt.offer or not (never or stamp == debt.stamp):
                forgot = stamp.epoch != debt.stamp.epoch or stamp.revision < debt.stamp.revision
                differing.append((tenant, forgot))
        remaining = iter(differing)
        while chunk := list(islice(remaining, CALLS_AT_ONCE)):
            self._bring_in_step(dict(chunk))

    def _stamps(self, known: Mapping[str, Stamp]) -> dict[str, Stamp]:
        """What the server holds, of the tenants of which it differs; and on the way its time."""
        remaining, tenants, calls = iter(known), list(known), []
        while chunk := list(islice(remaining, STAMPS_AT_ONCE)):
            calls.append(([self.key(tenant, "record") for tenant in chunk], [str(known[tenant]) for tenant in chunk]))
        sent = self._clock.monotonic()
        replies = self._link.run_all(STAMPS, calls)
        received = self._clock.monotonic()
        seen = {}
        try:
            for number, reply in enumerate(replies):
                told, stamps = decode_differing(reply)
                if number == 0:
                    self._clock_of(tenants[0]).note(sent, received, told)
                for place, stamp in stamps.items():
                    seen[tenants[number * STAMPS_AT_ONCE + place]] = stamp
        except STRANGE as error:
            self._link.fail(error)
            raise Away from error
        return seen

    def _stamps_apart(self, known: Mapping[str, Stamp]) -> dict[str, Stamp]:
        """What a cluster holds of each tenant: its pipelines take no scripts, so each node is asked the time apart."""
        keys = {tenant: self.key(tenant, "record") for tenant in known}

        def work(client: Client) -> object:
            pipeline = client.pipeline(transaction=False)
            for key in keys.values():
                pipeline.hmget(key, ("epoch", "generation", "revision"))
            return pipeline.execute()

        try:
            for tenant in {self._link.node_of(key): tenant for tenant, key in keys.items()}.values():
                sent = self._clock.monotonic()
                told = self._link.run(NOW, [keys[tenant]], (), probing=True)
                self._clock_of(tenant).note(sent, self._clock.monotonic(), int(str(told)))
            replies = self._link.call(work, probing=True)
            if not isinstance(replies, list):
                raise TypeError("a pipeline answers with a list")
            return dict(zip(keys, map(decode_stamp, replies), strict=True))
        except STRANGE as error:
            self._link.fail(error)
            raise Away from error

    def _bring_in_step(self, differing: Mapping[str, bool]) -> None:
        """Touch these records; to those that Redis forgot, our snapshot is offered, so that the last value lives on."""
        debts = {tenant: self._mirror.debt(tenant, offering=forgotten) for tenant, forgotten in differing.items()}
        calls = [(self._keys(tenant), self._known(tenant, debt)) for tenant, debt in debts.items()]
        sent = self._clock.monotonic()
        replies = self._link.run_all(TOUCH, calls)
        for (tenant, debt), reply in zip(debts.items(), replies, strict=True):
            self._settle(tenant, reply, debt, sent=sent)
