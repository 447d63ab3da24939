"""How one tenant's config API is reached: URLs that lead to no other host, and credentials of its own."""

from __future__ import annotations

import ipaddress
import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, SecretStr, field_validator

from external_oms.errors import SettingsError

__all__ = [
    "DEFAULT_BASE_URL",
    "DEFAULT_CONFIG_PATH",
    "DEFAULT_TOKEN_URL",
    "TenantSettings",
    "check_credentials",
    "check_header_text",
    "check_secret",
    "is_loopback",
    "is_tenant_name",
    "safe_path",
    "safe_scope",
    "safe_url",
]

DEFAULT_BASE_URL = "https://{tenant}.p.newstore.net"
DEFAULT_TOKEN_URL = "https://id.p.newstore.net/auth/realms/{tenant}/protocol/openid-connect/token"  # noqa: S105 - no secret
DEFAULT_CONFIG_PATH = "/v0/config/external_oms"

_TENANT = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def is_loopback(host: str | None) -> bool:
    """Return whether a host name or address never leaves this machine."""
    if host is None:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_tenant_name(name: str) -> bool:
    """Return whether a tenant can have this name: `[a-z0-9-]`, 1 to 63 characters."""
    return _TENANT.fullmatch(name) is not None


def safe_url(given: str) -> str:
    """Return a URL that may be called, without a slash at its end.

    Raises:
        ValueError: It is not https, and not http on loopback either; or it has a query, a fragment, credentials, white
            space or a control character; its port is none, or a brace is left where `{tenant}` is replaced.
    """
    _refuse_white_space(given)  # urlsplit drops some of it before anything else can look
    filled = given.replace("{tenant}", "tenant")
    if "{" in filled or "}" in filled:
        raise ValueError("must have no braces but those of {tenant}")
    parts = urlsplit(filled)
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("must have a port between 0 and 65535, or none") from None
    if not parts.hostname or parts.query or parts.fragment or parts.username or parts.password:
        raise ValueError("must be an absolute URL without query, fragment or credentials")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname)):
        raise ValueError("must be https (http is allowed on loopback only)")
    return given.rstrip("/")


def safe_path(given: str) -> str:
    """Return a path that stays below its host.

    Raises:
        ValueError: It is not absolute, leads elsewhere, or contains white space or a control character.
    """
    _refuse_white_space(given)
    if not given.startswith("/") or given.startswith("//") or "?" in given or "#" in given or ".." in given:
        raise ValueError("must be an absolute path, such as /v0/config/external_oms")
    return given


def safe_scope(given: str) -> str:
    """Return scopes that a form can hold.

    Raises:
        ValueError: They are not printable ASCII (RFC 6749 section 3.3).
    """
    if not given.isascii() or (given and not given.isprintable()):
        raise ValueError("must be scopes of printable ASCII, separated by spaces")
    return given


def _refuse_white_space(given: str) -> None:
    if " " in given or not given.isprintable():
        raise ValueError("must not contain white space or control characters; is there a newline at its end?")


class TenantSettings(BaseModel):
    """How one tenant's config API is reached, and with which credentials.

    Attributes:
        base_url: Scheme and host, and a path prefix if there is one; `{tenant}` stands for the tenant's name.
            https, or http on loopback. Default: the platform's host per tenant.
        config_path: Path of the resource. Not published; the default follows the published siblings of its family.
        write_method: `POST`, `PUT` or `PATCH`. Not published either; the siblings are written with POST.
        access_token: A static access token; or else
        client_id: and
        client_secret: for OAuth 2.0 client credentials, obtained at
        token_url: (default: the platform's realm of the tenant), with
        scope: the scopes to ask for, separated by spaces; empty asks for the client's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True)

    base_url: str = DEFAULT_BASE_URL
    config_path: str = DEFAULT_CONFIG_PATH
    write_method: Literal["POST", "PUT", "PATCH"] = "POST"
    access_token: SecretStr | None = None
    client_id: str | None = None
    client_secret: SecretStr | None = None
    token_url: str = DEFAULT_TOKEN_URL
    scope: str = ""

    @field_validator("base_url", "token_url")
    @classmethod
    def _safe_url(cls, given: str) -> str:
        return safe_url(given)

    @field_validator("scope")
    @classmethod
    def _safe_scope(cls, given: str) -> str:
        return safe_scope(given)

    @field_validator("config_path")
    @classmethod
    def _safe_path(cls, given: str) -> str:
        return safe_path(given)

    def config_url(self, tenant: str) -> str:
        """Return the URL of the tenant's configuration."""
        return self.base_url.replace("{tenant}", tenant) + self.config_path

    def token_endpoint(self, tenant: str) -> str:
        """Return the URL of the tenant's token endpoint."""
        return self.token_url.replace("{tenant}", tenant)


def check_credentials(prefix: str, given: TenantSettings) -> None:
    """Refuse a tenant without credentials, with two kinds of them, or with malformed ones.

    Args:
        prefix: What stands before a setting's name in messages, such as `tenants.acme.`.
        given: The tenant's settings.

    Raises:
        SettingsError: The credentials are missing, contradict each other or are malformed.
    """
    client = (given.client_id, given.client_secret)
    if given.access_token is not None and any(part is not None for part in client):
        raise SettingsError(
            f"{prefix}access_token", "is set beside client_id or client_secret; set the token or the client, not both"
        )
    if given.access_token is not None:
        check_header_text(f"{prefix}access_token", given.access_token.get_secret_value())
        return
    if given.client_id is None and given.client_secret is None:
        raise SettingsError(f"{prefix}access_token", "no credentials: set access_token, or client_id and client_secret")
    if given.client_id is None or given.client_secret is None:
        missing = "client_id" if given.client_id is None else "client_secret"
        raise SettingsError(f"{prefix}{missing}", "is not set beside its other half; client credentials are a pair")
    check_secret(f"{prefix}client_id", given.client_id)
    check_secret(f"{prefix}client_secret", given.client_secret.get_secret_value())


def check_header_text(setting: str, text: str, *, entry: int | None = None) -> None:
    """Refuse a secret that cannot be sent as a token in a header.

    Args:
        setting: The setting's name.
        text: The secret.
        entry: Its number, if the setting is a list.

    Raises:
        SettingsError: It is empty, or not printable ASCII without spaces; the message does not contain it.
    """
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        which = "" if entry is None else f"entry {entry} "
        raise SettingsError(setting, f"{which}must be printable ASCII without spaces; is there a newline at its end?")


def check_secret(setting: str, text: str, *, entry: int | None = None) -> None:
    """Refuse a secret that is empty or not UTF-8, or begins or ends with white space: it is compared and sent as it is.

    Args:
        setting: The setting's name.
        text: The secret.
        entry: Its number, if the setting is a list.

    Raises:
        SettingsError: It is; the message does not contain it.
    """
    which = "" if entry is None else f"entry {entry} "
    if not text:
        raise SettingsError(setting, f"{which}is empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # the environment can hold bytes that are not UTF-8
        raise SettingsError(setting, f"{which}is not UTF-8; was a key of random bytes not encoded?") from None
    if text != text.strip():
        raise SettingsError(
            setting,
            f"{which}begins or ends with white space; files and Kubernetes secrets often end with a newline: remove it "
            "(`printf %s` writes none, `echo` does)",
        )
