"""Explain refused settings: the name, what was given unless it may be a secret, and what is expected; pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pydantic_core import ErrorDetails

from external_oms.errors import SettingsError
from external_oms.tenants import TenantSettings

__all__ = ["refuse_unknown_variables", "settings_error"]

_SERVICE_LINK = re.compile(
    r"(?P<service>.*?)(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)"
)
"""The variables that Kubernetes sets in every pod for a Service, after the name of the Service."""

_EXPECTED = {
    "float_parsing": "seconds, such as 30",
    "float_type": "seconds, such as 30",
    "finite_number": "a finite number of seconds, such as 30",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a table, by tenant",
    "model_type": "a table",
    "literal_error": "{expected}",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than_equal": "{le:g} or less",
}
"""What is expected, by pydantic's types of errors; its own words are for programmers."""


def refuse_unknown_variables(environ: Mapping[str, str], fields: Iterable[str], *, prefix: str, also: str) -> None:
    """Refuse an environment variable with our prefix that is no setting: a misspelt setting would not hold.

    Args:
        environ: The environment.
        fields: The names of the settings.
        prefix: The prefix of their variables.
        also: A variable with the prefix that is allowed beside them.

    Raises:
        SettingsError: There is one.
    """
    known = {*fields, also.removeprefix(prefix).lower()}
    for variable in sorted(environ):
        name = variable.removeprefix(prefix)
        if name != variable and name.lower() not in known and not _is_service_link(name, prefix, environ):
            raise SettingsError(variable, _unknown(name.lower(), known))


def _is_service_link(name: str, prefix: str, environ: Mapping[str, str]) -> bool:
    """Return whether Kubernetes set a variable for a Service named `external-oms`, or `external-oms-…`.

    For the latter the host of the Service must be set too, so that a misspelt setting is not taken for a link.
    """
    found = _SERVICE_LINK.fullmatch(name)
    if found is None:
        return False
    service = found["service"]
    return not service or (service.endswith("_") and f"{prefix}{service}SERVICE_HOST" in environ)


def settings_error(first: ErrorDetails, fields: Iterable[str], *, file: str | None) -> SettingsError:
    """Return the error for one complaint of pydantic's.

    Args:
        first: The complaint.
        fields: The names of the settings.
        file: The TOML file, and the line where it is known, if the setting comes from there.
    """
    place = [str(part) for part in first["loc"] if not str(part).startswith("function-")]
    setting, kind, source = ".".join(place) or "settings", first["type"], f" (in {file})" if file else ""
    if kind == "extra_forbidden":
        if setting == "external_oms":
            return SettingsError(setting, f"no such setting{source}; settings stand at the top level, in no section")
        return SettingsError(setting, _unknown(place[-1], TenantSettings.model_fields if place[1:] else fields, source))
    expected = _EXPECTED.get(kind)
    wanted = str(first["msg"]).removeprefix("Value error, ")
    if expected is not None:
        wanted = "must be " + expected.format(**first.get("ctx", {}))
    given, shown = first["input"], f"is wrong{source}; " if source else ""
    secret = any(word in setting for word in ("secret", "token", "key")) or setting in {"store", "tenants"}
    if not secret and isinstance(given, str | int | float) and "@" not in str(given):  # a URL with a password
        shown = f"{str(given)[:80]!r} given{source}; "
    return SettingsError(setting, shown + wanted)


def _unknown(name: str, known: Iterable[str], source: str = "") -> str:
    from difflib import get_close_matches  # noqa: PLC0415 - needed for an error only

    close = get_close_matches(name, known, 1)
    advice = f"did you mean `{close[0]}`?" if close else "docs/settings.md of the project lists them all"
    return f"no such setting{source}; {advice}"
