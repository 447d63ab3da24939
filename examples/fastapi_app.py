"""A FastAPI service that evaluates the flag for every order and takes the webhook.

    uvicorn --app-dir examples fastapi_app:app --workers 4

Settings come from the environment, `EXTERNAL_OMS_…`. Several workers need a store that they share: sqlite:// or redis://.
It needs no extra of this package: `external_oms.webhook` decides about a delivery without a web framework.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from openfeature import api
from openfeature.exception import OpenFeatureError

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.webhook import PATH, Webhook


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Register the provider while the service runs."""
    provider = ExternalOMSProvider()
    app.state.webhook = Webhook(provider)
    with suppress(OpenFeatureError):  # a config API that is down does not keep the service from starting
        await run_in_threadpool(api.set_provider_and_wait, provider)
    yield
    await run_in_threadpool(api.shutdown)


app = FastAPI(lifespan=lifespan)


@app.post("/orders", status_code=201)
async def place_order() -> dict[str, str | None]:
    """Evaluate with the async method: a first read, or a slow one, does not stall the event loop."""
    details = await api.get_client().get_boolean_details_async(FLAG_KEY, default_value=False)
    return {"owner": "external" if details.value else "ours", "reason": details.reason}


@app.post(PATH, include_in_schema=False)
async def deliver(request: Request) -> JSONResponse:
    """Take a delivery: the signature covers the raw body, so read bytes, and no more than may be taken."""
    webhook: Webhook = request.app.state.webhook
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > webhook.max_bytes:
            break  # receive answers 413
    # receive waits for the read that follows the delivery, so it runs in a thread.
    response = await run_in_threadpool(webhook.receive, request.headers, body)
    return JSONResponse(response.document, response.status, dict(response.headers))
