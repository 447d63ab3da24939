from __future__ import annotations

import socket

import pytest

from external_oms.web.serving import is_private, is_taken


@pytest.mark.parametrize("bind", ["127.0.0.1:8080", "localhost:80", "[::1]:8080", "127.8.8.8:1", "unix:/run/oms.sock"])
def test_loopback_and_a_unix_socket_are_private(bind: str) -> None:
    assert is_private(bind)


@pytest.mark.parametrize("bind", ["0.0.0.0:8080", "[::]:8080", ":8080", "example.com:80", "10.0.0.1:80", "fd://3"])
def test_anything_else_is_not(bind: str) -> None:
    assert not is_private(bind)


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.0.0.1:", "host:port", "host:70000", "a/b:80", "u@h:80", "[::1:80"])
def test_what_is_no_address_is_refused(bind: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        is_private(bind)


def test_an_address_is_taken_while_somebody_listens_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as line:
        bind = f"127.0.0.1:{line.getsockname()[1]}"
        assert is_taken(bind)
    assert not is_taken(bind)
    assert not is_taken("unix:/tmp/never.sock")
    assert not is_taken("[::1]:0") or not socket.has_ipv6
