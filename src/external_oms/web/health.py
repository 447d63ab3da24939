"""What a load balancer needs: is this process alive, has it something to serve; a dead API alone takes nobody out.

`/readyz` answers 503 only where not one tenant has an answer: to take a process out for one tenant's sake, or for an
API that is dead for every process alike, would take the service away from those who can be served.
Both are open, so they name no tenant.
"""

from __future__ import annotations

from collections import Counter
from http import HTTPStatus

from flask import Blueprint, Response, jsonify

from external_oms.policy import Freshness, State
from external_oms.settings import Settings
from external_oms.web.parts import Parts
from external_oms.web.problems import resource
from external_oms.web.shapes import JSON

__all__ = ["blueprint"]


def blueprint(parts: Parts) -> Blueprint:
    """The two health routes of one app."""
    mounted = Blueprint("health", __name__)

    def healthz() -> Response:
        return jsonify({"status": "alive"})

    def readyz() -> tuple[Response, int]:
        cache, store = parts.service.cache, parts.service.store
        cache.start()  # a worker forked before the first read ended is asked nothing else until it is ready
        states = [cache.state(name) for name in cache.tenants]
        health = store.health()
        ready = any(_has_answer(state, parts.settings) for state in states)
        problems = [] if health.ok else [health.problem]
        problems += _read_problems(states)
        body: dict[str, JSON] = {
            "status": "unready" if not ready else "degraded" if problems else "ready",
            "problems": list[JSON](problems),
            "store": {"kind": store.kind, "ok": health.ok},
            "tenants": _counted(states),
        }
        return jsonify(body), HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE

    resource(mounted, "/healthz", GET=healthz)
    resource(mounted, "/readyz", GET=readyz)
    return mounted


def _has_answer(state: State, settings: Settings) -> bool:
    """Whether an evaluation of this tenant gets an answer now, without waiting for a first read."""
    if state.freshness is not Freshness.EXPIRED:
        return True
    if settings.refresh == "lazy" and not state.failures:
        return True  # it reads when it is first asked, and it is asked only once it is ready
    if settings.when_expired == "last":
        return state.enabled is not None
    # a policy answers too, but a process that has not even tried to read is not ready yet
    return settings.when_expired != "default" and (state.enabled is not None or state.failures > 0)


def _read_problems(states: list[State]) -> list[str]:
    failing = [state for state in states if state.failures]
    if not failing:
        return []
    served = sum(state.freshness is not Freshness.EXPIRED for state in failing)
    whose = f"{len(failing)} of {len(states)} tenants"
    return [f"reads of the config API fail for {whose}; {served} of them are served from their last known value"]


def _counted(states: list[State]) -> dict[str, JSON]:
    by_freshness = Counter(state.freshness for state in states)
    counts: dict[str, JSON] = {freshness.value: by_freshness[freshness] for freshness in Freshness}
    return {"configured": len(states), **counts, "failing": sum(state.failures > 0 for state in states)}
