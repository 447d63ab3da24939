"""The flag as a flagd definition, for those who run flagd: one GET for its HTTP sync, 304 while nothing changes.

It says what is served now, so it is polled: flagd has no way to be told. Source: flagd's flag definition schema v0.
"""

from __future__ import annotations

from http import HTTPStatus

from flask import Blueprint, Response, request

from external_oms.config import FLAG_KEY
from external_oms.policy import Evaluation
from external_oms.resolution import VARIANTS
from external_oms.settings import Settings
from external_oms.web.access import Role, demand
from external_oms.web.ofrep_shapes import Flag, compact, configuration_of, flag_of
from external_oms.web.parts import Parts
from external_oms.web.problems import resource
from external_oms.web.shapes import JSON

__all__ = ["blueprint", "definition"]

SCHEMA = "https://flagd.dev/schema/v0/flags.json"


def blueprint(parts: Parts) -> Blueprint:
    """The definition on one app."""
    mounted = Blueprint("flagd", __name__)
    cache = parts.service.cache

    def flags() -> Response:
        who = demand(Role.VIEWER)
        parts.limits.take_here("evaluate", who.name, per_minute=parts.settings.evaluations_per_minute)
        named = request.args.get("tenant")
        tenants = cache.tenants if named is None else (cache.tenant_of(named),)
        shape = definition([cache.lookup(tenant) for tenant in tenants], parts.settings)
        etag = configuration_of((shape,)).tag
        headers = {"ETag": f'"{etag}"', "Cache-Control": "no-cache"}
        if request.if_none_match.contains_weak(etag):
            return Response(status=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(compact(shape), content_type="application/json", headers=headers)

    resource(mounted, "/flagd/flags.json", GET=flags)
    return mounted


def definition(evaluations: list[Evaluation], settings: Settings) -> Flag:
    """The definition: of one tenant, its variant; of several, a choice by the attribute `tenant` of the context.

    A tenant of which nothing may be served has no variant, so that flagd's caller takes its own default; where that
    holds for all, the flag is disabled, which says the same in every version of flagd.
    """
    served = {one.tenant: flag_of(one, settings.when_expired) for one in evaluations}
    chosen = {tenant: str(flag["variant"]) for tenant, flag in served.items() if "value" in flag}
    flag: dict[str, JSON] = {
        "state": "ENABLED" if chosen else "DISABLED",
        "variants": {variant: value for value, variant in VARIANTS.items()},
        "defaultVariant": next(iter(chosen.values()), "off") if len(served) == 1 else None,
    }
    if len(served) > 1:
        branches: list[JSON] = []
        for tenant, variant in chosen.items():
            branches += [{"==": [{"var": "tenant"}, tenant]}, variant]
        flag["targeting"] = {"if": [*branches, None]}
    return {"$schema": SCHEMA, "flags": {FLAG_KEY: flag}}
