"""An order, and the webhook. Both are exempt from CSRF: no browser form sends them."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST
from openfeature import api

from external_oms import FLAG_KEY
from orders.flags import get_webhook


@csrf_exempt
@require_POST
def place_order(request: HttpRequest) -> JsonResponse:
    """Evaluate the flag for an order."""
    details = api.get_client().get_boolean_details(FLAG_KEY, default_value=False)
    return JsonResponse({"owner": "external" if details.value else "ours", "reason": details.reason}, status=201)


@csrf_exempt  # a delivery carries a signature
@require_POST
def deliver(request: HttpRequest) -> HttpResponse:
    """Take a delivery: the signature covers the raw body, so read bytes, and no more than may be taken."""
    webhook = get_webhook()
    response = webhook.receive(request.headers, request.read(webhook.max_bytes + 1))
    return HttpResponse(response.body, status=response.status, headers=dict(response.headers))
