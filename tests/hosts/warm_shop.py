"""The shop with its value at hand before gunicorn forks its workers: what `--preload` makes of an evaluation."""

from __future__ import annotations

from external_oms import FLAG_KEY
from tests.hosts.shop import app, client
from tests.support.waiting import wait_until

__all__ = ["app"]

wait_until(lambda: client.get_boolean_details(FLAG_KEY, default_value=False).error_code is None)
