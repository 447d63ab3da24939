"""A stream says that it is worth asking again, never what the answer is; its address opens streams alone, and not long.

An event's id is the digest of what the flags said: the same in every process. So whichever worker a listener comes back
to can tell by `Last-Event-ID` whether it missed something. Source: OFREP ADR-0008; WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from urllib.parse import urlencode

from flask import Request, Response
from itsdangerous import BadData, URLSafeSerializer

from external_oms.cache import Cache, ChangeKind
from external_oms.policy import Freshness
from external_oms.settings import Settings
from external_oms.web.access import Identity, Keyring, Role, Via
from external_oms.web.ofrep_shapes import Configuration, configuration_of, flag_of
from external_oms.web.streams import Hub, Message, stream_response

__all__ = ["SLOT_SECONDS", "Tickets", "instant_of", "refetch_stream", "stream_address"]

SLOT_SECONDS = 600
"""Tickets made within one slot are the same, so that answers which carry one are too; each is good until the end of the
slot after its own, 10 to 20 minutes: longer than from an answer to the stream it names, shorter than a log is kept."""


class Tickets:
    """Short-lived signed words that open event streams: EventSource cannot send headers, so they stand in the address.

    A ticket is bound to the name and the role of a key, and worth nothing when that key is gone. Every process with the
    same settings makes and knows the same ones: they are signed with `session_secret`, or where it is not set with what
    `api_keys` holds, which nobody outside has.

    Args:
        settings: The keys.
        keyring: The same keys, ready to recognise.
        wall: Seconds since the Unix epoch.
    """

    def __init__(self, settings: Settings, keyring: Keyring, wall: Callable[[], float]) -> None:
        own = settings.session_secret
        secret = "\n".join(sorted(settings.api_keys)) if own is None else own.get_secret_value()
        self._serializer = URLSafeSerializer(secret, salt="external_oms.events", serializer=json)
        self._keyring = keyring
        self._wall = wall

    def ticket(self, identity: Identity) -> str | None:
        """A ticket for whoever came with a key or a ticket; None for others: their browser sends along who they are."""
        if identity.via not in {Via.KEY, Via.TICKET}:
            return None
        ends = (int(self._wall()) // SLOT_SECONDS + 2) * SLOT_SECONDS
        return self._serializer.dumps([identity.name, identity.role.word, ends])

    def identity(self, asked: Request) -> Identity | None:
        """Whose ticket a request for a stream shows in its query; None where it shows none that is good."""
        shown = asked.args.get("token")
        endpoint = asked.endpoint or ""
        if shown is None or asked.method != "GET" or endpoint.rpartition(".")[2] != "events":
            return None
        try:
            name, role, ends = self._serializer.loads(shown)
            identity = Identity(name, Role.named(role), Via.TICKET)
        except (BadData, ValueError, TypeError):
            return None
        return identity if ends > self._wall() and self._keyring.has(identity) else None


def stream_address(path: str, *, tenant: str, since: str, ticket: str | None) -> str:
    """Path and query of a tenant's stream.

    Args:
        path: The path of the route, as it is seen from outside.
        tenant: The tenant.
        since: The tag of the configuration that the listener has.
        ticket: What opens it; None: nothing is needed, or a header is sent.
    """
    query = {"tenant": tenant, "since": since} | ({} if ticket is None else {"token": ticket})
    return f"{path}?{urlencode(query)}"


def instant_of(given: str | None) -> float | None:
    """Seconds since the Unix epoch, out of `flagConfigLastModified`: a whole number, or ISO 8601; else None."""
    if given is None:
        return None
    try:
        return float(int(given)) if given.isdecimal() else datetime.fromisoformat(given).timestamp()
    except (ValueError, OverflowError):
        return None


def refetch_stream(
    hub: Hub,
    cache: Cache,
    settings: Settings,
    *,
    tenant: str,
    known: str | None,
    etag_of: Callable[[Configuration], str],
) -> Response:
    """The stream of one listener: an event whenever the flags say something else than what it knows.

    Between an invalidation and the read that follows it the old value is merely stale, for milliseconds: that is not
    worth asking for. So a delivery that changes nothing costs no listener anything.

    Args:
        hub: Where to listen.
        cache: What the flags say.
        settings: What is said when there is nothing to serve.
        tenant: Whose flag.
        known: The tag of what the listener has, as it says itself; None: what is so now.
        etag_of: The ETag of the bulk answer that the listener would get.

    Raises:
        Problem: 503: too many streams.
    """
    told = known

    def news() -> Iterable[Message]:
        nonlocal told
        evaluation = cache.peek(tenant)
        if evaluation.entry.failure is None and evaluation.freshness is not Freshness.FRESH:
            return  # a read is on its way, and brings news of its own
        now = configuration_of((flag_of(evaluation, settings.when_expired),), evaluation)
        if told is None:
            yield Message("", "", id=now.tag)
        elif now.tag != told:
            event = {"type": "refetchEvaluation", "etag": etag_of(now), "lastModified": now.read_at}
            yield Message("message", json.dumps(event), id=now.tag)
        told = now.tag

    def render(name: str, _: ChangeKind) -> Iterable[Message]:
        return news() if name == tenant else ()

    return stream_response(hub, render, first=news)
