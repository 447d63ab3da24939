"""What is mounted on one app, in one value: a blueprint is made of it, and finds it there again."""

from __future__ import annotations

from dataclasses import dataclass, field

from flask import Flask

from external_oms.provider import ExternalOMSProvider
from external_oms.settings import Settings
from external_oms.signals import Signal
from external_oms.web.access import EXTENSION, Access
from external_oms.web.hooks import Evaluated
from external_oms.web.limits import Limits
from external_oms.web.streams import Hub
from external_oms.wiring import Service

__all__ = ["Parts", "parts_of"]


@dataclass(frozen=True, slots=True)
class Parts:
    """The state of the extension on one app; `app.extensions["external_oms"]`.

    Attributes:
        provider: What resolves the flag.
        settings: Its settings.
        access: Who may do what.
        limits: How often.
        hub: The event streams.
        url_prefix: Under which everything is mounted; empty, or with a slash in front and none at the end.
        mounted: The names of the mounted parts.
        evaluated: Told of every evaluation over HTTP.
        refused: Told the kind of problem that a delivery was refused with.
    """

    provider: ExternalOMSProvider
    settings: Settings
    access: Access
    limits: Limits
    hub: Hub
    url_prefix: str
    mounted: frozenset[str]
    evaluated: Signal[Evaluated] = field(default_factory=Signal)
    refused: Signal[str] = field(default_factory=Signal)

    @property
    def service(self) -> Service:
        """The parts that the provider is made of: cache, store, operations."""
        return self.provider.service


def parts_of(app: Flask) -> Parts | None:
    """What is mounted on an app, or None."""
    found = app.extensions.get(EXTENSION)
    return found if isinstance(found, Parts) else None
