"""How tests reach a config API that is emulated, or a server that means harm, over real connections."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from pydantic import SecretStr

from external_oms.auth import ClientCredentials, StaticToken, TokenSource
from external_oms.client import ConfigClient
from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.emulator import ConfigAPIEmulator
from external_oms.settings import TenantSettings
from tests.support.hostile import Line
from tests.support.waiting import wait_until

__all__ = [
    "DEADLINE",
    "DOCUMENT",
    "SLACK",
    "TOKEN",
    "answer",
    "client_at",
    "descriptors",
    "nothing_left_behind",
    "own_or_users",
    "recording",
    "script_of",
    "silence",
]

TOKEN = "t0ken-do-not-print"
DOCUMENT = b'{"enabled": true}'
DEADLINE = 0.4
SLACK = 4 * DEADLINE
"""A call promises to end at its deadline; where that is measured, five times as much is allowed."""


def descriptors() -> int:
    """How many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Afterwards: the threads and the descriptors of before."""
    threads, before = set(threading.enumerate()), descriptors()
    yield
    wait_until(  # a server's thread may still be on its way out
        lambda: set(threading.enumerate()) <= threads and descriptors() <= before,
        message="threads or descriptors are left behind",
    )


@contextmanager
def own_or_users(kind: str) -> Iterator[requests.Session | None]:
    """None, for connections of the client's own; or a session of the user's."""
    if kind == "own":
        yield None
        return
    with requests.Session() as session:
        yield session


def client_at(
    api: ConfigAPIEmulator | str,
    *,
    tenant: str = "acme",
    token: TokenSource | None = None,
    session: requests.Session | None = None,
    timeout_seconds: float = 5.0,
    clock: Clock = SYSTEM_CLOCK,
) -> ConfigClient:
    """A client of the emulator with client credentials, or of the server at an address with a static token."""
    if isinstance(api, str):
        settings = TenantSettings(base_url=api)
        token = token or StaticToken(SecretStr(TOKEN))
    else:
        settings = api.tenant_settings(tenant)
        assert settings.client_id is not None
        assert settings.client_secret is not None
        token = token or ClientCredentials(
            tenant=tenant,
            endpoint=settings.token_endpoint(tenant),
            client_id=settings.client_id,
            client_secret=settings.client_secret,
            scope=settings.scope,
            session=session,
            clock=clock,
            timeout_seconds=timeout_seconds,
            retry_after_max_seconds=300,
        )
    return ConfigClient(
        tenant=tenant,
        settings=settings,
        token=token,
        session=session,
        clock=clock,
        timeout_seconds=timeout_seconds,
        retry_after_max_seconds=300,
    )


def answer(body: bytes, *headers: bytes, status: bytes = b"200 OK", length: int | None = None) -> bytes:
    """An answer of HTTP/1.1, byte for byte."""
    lines = [b"HTTP/1.1 " + status, *headers, b"Content-Length: %d" % (len(body) if length is None else length)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def recording(seen: list[bytes], *headers: bytes) -> Callable[[Line], None]:
    """Answers with the document, and keeps what was asked."""

    def script(line: Line) -> None:
        seen.append(line.request())
        line.send(answer(DOCUMENT, b"Connection: close", *headers))

    return script


def script_of(content: bytes) -> Callable[[Line], None]:
    """Read the request and send this."""

    def script(line: Line) -> None:
        line.request()
        line.send(content)

    return script


def silence(line: Line) -> None:
    """Take the connection, and say nothing."""
    line.hold()
