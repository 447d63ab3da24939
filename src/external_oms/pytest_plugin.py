"""The pytest fixtures for users' tests. The emulator, and Flask with it, is imported when its fixture is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import pytest

from external_oms.override import override_enabled

if TYPE_CHECKING:
    from external_oms.testing import ConfigAPIEmulator

__all__ = ["SetEnabled", "external_oms_api", "external_oms_enabled"]


class SetEnabled(Protocol):
    """The value of the fixture `external_oms_enabled`."""

    def __call__(self, value: bool, tenant: str | None = None, *, domain: str | None = None) -> None:
        """Set the flag until the test ends; the arguments are those of `external_oms.testing.override_enabled`."""
        ...  # pragma: no cover - a Protocol's body never runs


@pytest.fixture
def external_oms_api() -> Iterator[ConfigAPIEmulator]:
    """A running emulator of the config API of the tenant `acme-staging`; it stops when the test ends."""
    from external_oms.testing import ConfigAPIEmulator  # noqa: PLC0415 - imports Flask

    with ConfigAPIEmulator() as emulator:
        yield emulator


@pytest.fixture
def external_oms_enabled() -> Iterator[SetEnabled]:
    """Set the flag for this test, before or after the application is created: `external_oms_enabled(True)`."""
    with ExitStack() as overrides:

        def set_enabled(value: bool, tenant: str | None = None, *, domain: str | None = None) -> None:
            overrides.enter_context(override_enabled(value, tenant, domain=domain))

        yield set_enabled
