"""The provider of this project and its webhook, made once in a process."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

from openfeature import api
from openfeature.exception import OpenFeatureError

from external_oms import ExternalOMSProvider
from external_oms.webhook import Webhook


@cache
def get_webhook() -> Webhook:
    """Register the provider, wait for its first read, and return its webhook."""
    provider = ExternalOMSProvider()
    with suppress(OpenFeatureError):  # a config API that is down does not keep the server from starting
        api.set_provider_and_wait(provider)
    return Webhook(provider)
