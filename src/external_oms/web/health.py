"""`/healthz` and `/readyz` for load balancers. Both are open, so they name no tenant, no path and no error.

A process is ready once it knows a value of one tenant, or has failed to read one and `when_expired` is `on` or `off`.
It stays ready while the config API fails, however old the value grows: an outage is the same for every process, and
taking all of them out would take the webhook away too. The body says `degraded` meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from http import HTTPStatus

from flask import Blueprint, Response, jsonify

from external_oms.policy import Freshness, State
from external_oms.problems import JSON
from external_oms.web.state import current_oms

__all__ = ["bp"]

bp = Blueprint("health", __name__)


@bp.get("/healthz")
def healthz() -> Response:
    """Return that the process is alive."""
    return jsonify({"status": "alive"})


@bp.get("/readyz")
def readyz() -> tuple[Response, int]:
    """Return whether this process may be sent requests, and what is wrong."""
    cache, store = current_oms.cache, current_oms.store
    cache.start()  # a worker that was forked before the first read gets no request until it is ready
    states = [cache.state(name) for name in cache.tenants]
    is_ready = current_oms.settings.refresh == "lazy" or any(_has_answer(state) for state in states)
    is_shared = store.health().ok
    problems = [] if is_shared else [f"the {store.kind} store cannot be used as configured; the log says why"]
    problems += _read_problems(states)
    body: dict[str, JSON] = {
        "status": "unready" if not is_ready else "degraded" if problems else "ready",
        "problems": list[JSON](problems),
        "store": {"kind": store.kind, "ok": is_shared},
        "tenants": _counts(states),
    }
    return jsonify(body), HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE


def _has_answer(state: State) -> bool:
    return state.enabled is not None or (state.failures > 0 and current_oms.settings.when_expired in {"on", "off"})


def _read_problems(states: Sequence[State]) -> list[str]:
    failing = [state for state in states if state.failures]
    if not failing:
        return []
    served = sum(state.freshness is not Freshness.EXPIRED for state in failing)
    whose = f"{len(failing)} of {len(states)} tenants"
    return [f"reads of the config API fail for {whose}; {served} of them are served from their last known value"]


def _counts(states: Sequence[State]) -> dict[str, JSON]:
    by_freshness = Counter(state.freshness for state in states)
    counts: dict[str, JSON] = {freshness.value: by_freshness[freshness] for freshness in Freshness}
    return {"configured": len(states), **counts, "failing": sum(state.failures > 0 for state in states)}
