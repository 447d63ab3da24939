"""A Celery worker whose tasks evaluate the flag, with the prefork pool.

    celery --workdir examples --app celery_worker worker --pool prefork --concurrency 4

A worker takes no webhook, so it needs a store that is shared with a process that does (a web application, or
`external-oms serve`): EXTERNAL_OMS_STORE=redis://…, or sqlite:////path/state.db on one host.
"""

from __future__ import annotations

import os
from contextlib import suppress

from celery import Celery
from celery.signals import worker_init, worker_shutdown
from openfeature import api
from openfeature.exception import OpenFeatureError

from external_oms import FLAG_KEY, ExternalOMSProvider

BROKER = os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:6379/1")
app = Celery("orders", broker=BROKER, backend=BROKER)


@worker_init.connect
def register_provider(**_: object) -> None:
    """Register the provider in the parent, before it forks: children start with its value, and follow the store.

    Not at import, since the applications that send tasks import this module too.
    """
    with suppress(OpenFeatureError):  # a config API that is down does not keep the worker from starting
        api.set_provider_and_wait(ExternalOMSProvider())


@worker_shutdown.connect
def shut_down(**_: object) -> None:
    """End the threads and connections of the provider."""
    api.shutdown()


@app.task
def route_order(number: int) -> dict[str, object]:
    """Evaluate the flag for an order."""
    details = api.get_client().get_boolean_details(FLAG_KEY, default_value=False)
    owner = "external" if details.value else "ours"
    return {"order": number, "owner": owner, "reason": details.reason, "pid": os.getpid()}
