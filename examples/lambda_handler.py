"""An AWS Lambda function behind a function URL or an HTTP API (payload format 2.0): orders, and the webhook.

The handler is `lambda_handler.handler`. Lambda freezes a process between invocations, so a background thread cannot
keep the value fresh there: with `refresh="lazy"` evaluations cause the reads, one at a time, and a value that is stale
is served meanwhile. Ages count on a clock that goes on while the process is frozen.

Every concurrent invocation has a process of its own, so a delivery reaches all of them only with
EXTERNAL_OMS_STORE=rediss://…. With the default store, the bound on staleness is `ttl_seconds`.
"""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from typing import Any

from openfeature import api
from openfeature.exception import OpenFeatureError

from external_oms import FLAG_KEY, ExternalOMSProvider, Settings
from external_oms.webhook import PATH, Webhook

# At import, in the init phase, which has more processor than an invocation; warm invocations find the value.
provider = ExternalOMSProvider(Settings(refresh="lazy"))
webhook = Webhook(provider)
with suppress(OpenFeatureError):  # a config API that is down does not keep the function from starting
    api.set_provider_and_wait(provider)


def handler(event: dict[str, Any], context: object) -> dict[str, Any]:
    """Answer one request."""
    if event["rawPath"] == PATH:
        body = event.get("body", "")
        raw = base64.b64decode(body) if event.get("isBase64Encoded") else body.encode()
        response = webhook.receive(event["headers"], raw)
        return {"statusCode": response.status, "headers": dict(response.headers), "body": response.body.decode()}
    details = api.get_client().get_boolean_details(FLAG_KEY, default_value=False)
    document = {"owner": "external" if details.value else "ours", "reason": details.reason}
    return {"statusCode": 201, "headers": {"content-type": "application/json"}, "body": json.dumps(document)}
