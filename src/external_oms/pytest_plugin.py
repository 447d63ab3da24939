"""The fixtures for users' tests; nothing of the server is imported before one of them is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from external_oms.testing import ConfigAPIEmulator

__all__ = ["SetEnabled", "external_oms_api", "external_oms_enabled"]


class SetEnabled(Protocol):
    """What `external_oms_enabled` gives."""

    def __call__(self, value: bool, tenant: str | None = None, *, domain: str | None = None) -> None:
        """Let the flag have this value until the test ends; see `external_oms.testing.override_enabled`."""
        ...  # pragma: no cover - a Protocol's body never runs


@pytest.fixture
def external_oms_api() -> Iterator[ConfigAPIEmulator]:
    """The config API of the tenant `acme-staging` on loopback, started; it stops when the test ends."""
    from external_oms.testing import ConfigAPIEmulator  # noqa: PLC0415 - Flask comes in with the first use

    with ConfigAPIEmulator() as emulator:
        yield emulator


@pytest.fixture
def external_oms_enabled() -> Iterator[SetEnabled]:
    """Set `external_oms_enabled` for this test: `external_oms_enabled(True)`, or for one tenant by `tenant=`."""
    from external_oms.testing import override_enabled  # noqa: PLC0415 - as above

    with ExitStack() as overrides:

        def set_enabled(value: bool, tenant: str | None = None, *, domain: str | None = None) -> None:
            overrides.enter_context(override_enabled(value, tenant, domain=domain))

        yield set_enabled
