"""The table of settings: names, defaults, units and reasons; contradictions are refused here and nowhere else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from external_oms.errors import SettingsError
from external_oms.policy import Windows
from external_oms.settings_errors import refuse_unknown_variables, settings_error
from external_oms.store_url import StoreURL, check_store_url
from external_oms.tenants import (
    DEFAULT_BASE_URL,
    DEFAULT_CONFIG_PATH,
    DEFAULT_TOKEN_URL,
    TenantSettings,
    check_credentials,
    check_header_text,
    check_secret,
    is_tenant_name,
    safe_path,
    safe_scope,
    safe_url,
)

__all__ = ["ENV_PREFIX", "Settings", "TenantSettings", "listed"]

ENV_PREFIX = "EXTERNAL_OMS_"
CONFIG_FILE_VARIABLE = f"{ENV_PREFIX}CONFIG_FILE"


def listed(given: object) -> object:
    """Return a list from the environment: JSON, or separated by commas; anything but text as it is.

    Raises:
        ValueError: It begins as JSON does, and is not JSON.
    """
    if not isinstance(given, str):
        return given
    text = given.strip()
    if text.startswith("["):
        return _json(text, "must be JSON or separated by commas")
    return [part.strip() for part in text.split(",") if part.strip()]


def _mapped(given: object) -> object:
    """Return a mapping from the environment: JSON."""
    example = """must be JSON, such as {"acme": {"access_token": "…"}}"""
    return _json(given, example) if isinstance(given, str) else given


def _json(text: str, otherwise: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(otherwise) from None  # json's own error holds the text, which may hold secrets


Listed = BeforeValidator(listed)
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, Listed]
Texts = Annotated[tuple[str, ...], NoDecode, Listed]
# thirty years at the most: the system cannot wait for three hundred
Seconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
SecondsOrNone = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]


def _file_of(place: Sequence[int | str], keywords: Mapping[str, object]) -> str | None:
    """Return the TOML file, and the line if it is clear, where neither a keyword nor the environment has the setting.

    Args:
        place: The names that lead to the setting.
        keywords: The settings given by keyword.
    """
    setting, file = str(place[0]), os.environ.get(CONFIG_FILE_VARIABLE)
    if file is None or setting in keywords or f"{ENV_PREFIX}{setting}".upper() in os.environ:
        return None
    name = next(part for part in reversed(place) if isinstance(part, str) and not part.startswith("function-"))
    defined = re.compile(rf"""\s*\[?(?:[\w"'-]+\.)*["']?{re.escape(name)}["']?\s*[=\]]""")
    lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    numbers = [number for number, line in enumerate(lines, start=1) if defined.match(line)]
    return f"{file}, line {numbers[0]}" if len(numbers) == 1 else file


class _TomlFile(PydanticBaseSettingsSource):
    """The TOML file that EXTERNAL_OMS_CONFIG_FILE names, as a source of settings."""

    def get_field_value(self, field: object, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002 - as the base
        """Return nothing: the file is read as a whole."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        import tomllib  # noqa: PLC0415 - few have such a file

        named = os.environ.get(CONFIG_FILE_VARIABLE)
        if not named:
            return {}
        try:
            return tomllib.loads(Path(named).expanduser().read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            # Only the place: the rest of the message may quote the file, which holds secrets.
            place = re.search(r"at (?:line \d+, column \d+|end of document)", str(error))
            problem, cause = f"it is not TOML {place[0] if place else ''}".rstrip(), None
        except UnicodeDecodeError:
            problem, cause = "it is not UTF-8", None
        except (OSError, RecursionError) as error:
            problem, cause = getattr(error, "strerror", None) or "it is nested too deeply", error
        raise SettingsError("config_file", f"{named} cannot be read: {problem}") from cause


class Settings(BaseSettings):
    """Everything that can be set: by keyword, else by environment (`EXTERNAL_OMS_<NAME>`), else by the TOML file.

    Durations are float seconds. Lists in the environment are JSON or separated by commas; `tenants` is JSON.

    Attributes:
        tenant: The one tenant's name (`[a-z0-9-]`), or
        tenants: several: name to `TenantSettings`. What an entry leaves out it takes from the fields of the same name
            here, credentials excepted: no two tenants ever share one.
        ttl_seconds: How long a value is fresh. 30: the bound on staleness when nothing ever calls the webhook.
        stale_while_revalidate_seconds: How long after that an old value may be served while a read runs. 30: one more
            lifetime.
        stale_if_error_seconds: How long after that it may be served while reads fail. 3600: an outage of an hour
            routes on.
        when_expired: What is served after that: the caller's `default` (as an error), `on`, `off`, or the `last` value.
        timeout_seconds: The limit of one read, obtaining a token included. 5.
        retry_after_max_seconds: The longest Retry-After that is obeyed. 300: a wrong date must not silence a tenant.
        refresh: `background`: a thread reads before values grow stale; `lazy`: evaluations cause the reads.
        max_concurrent_reads: Reads at once in one process, over all tenants. 16: a few hanging tenants leave room.
        store: How far an invalidation reaches: `memory://`, `sqlite:////path/state.db`, `redis://…`.
        store_prefix: Prefix of every key in Redis.
        store_bound_seconds: In a fleet, the longest that a lost invalidation stays unseen by a process that reaches
            Redis, 0.1 or more. 5.
        history_rows: How many rows of history are kept per store. 10000.
        history_seconds: And for how long. 30 days.
        webhook_secrets: Standard Webhooks secrets (`whsec_…`); several while rotating.
        webhook_api_keys: Keys that a sender of deliveries may show as a bearer instead; 8 characters or more.
        webhook_tolerance_seconds: How far a delivery's timestamp may be off, at most 1800. 300, as Standard Webhooks
            asks.
        webhook_max_bytes: The largest delivery. 65536; the specification asks senders to stay under 20 kB.
        webhook_per_minute: How many deliveries of one tenant, and how many refused ones of one address, are taken
            a minute.
            6000: a storm raises the generation each time and costs few reads, so this only bounds a flood.
        max_waiters_per_tenant: Deliveries of one tenant that wait for its read at once in one process; the others are
            answered 202 at once. 16: a tenant whose API hangs leaves threads for the others.
        writes_per_minute: How often one name may switch, and how often have the API read, a minute. 60: as often as
            the API likes.
        logins_per_minute: How often one address may try to log in, a minute. 10: no person mistypes faster.
        api_keys: `name:role:sha256-hex` entries of who may see (viewer), refresh (operator) and switch (admin).
        dashboard: Whether the page is served.
        metrics_open: Whether `/metrics` is served without a key.
        ofrep_origins: Browser origins that may call OFREP. None: no cross-origin access.
        max_streams: Server-sent event streams at once in one process. 500: each holds a thread, of 4096 in many
            containers.
        proxies: How many proxies stand in front of the server. 0: no X-Forwarded header is believed. Each proxy must
            set, or remove, X-Forwarded-For, -Proto, -Host and -Prefix.
        session_secret: Signs session cookies. Not set: made up at each start, so that logins end with the server; set
            the same one at every host of a fleet.
        session_seconds: How long a login lasts. 8 hours: a shift.
        environment: What this server is for, such as `production`: a word on every page. None: no word.
        environment_color: Its colour: `red`, `amber`, `green`, `blue`, `purple` or `gray`. None: by the word, red for
            production, amber for staging and tests, blue for anything else.
        insecure: Start without credentials; on loopback only.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        defer_build=True,  # a fifth of what importing the package would take; built where the first object is made
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=False,
        hide_input_in_errors=True,
    )

    tenant: str | None = None
    tenants: Annotated[dict[str, TenantSettings], NoDecode, BeforeValidator(_mapped)] = Field(default_factory=dict)
    base_url: str = DEFAULT_BASE_URL
    config_path: str = DEFAULT_CONFIG_PATH
    write_method: Literal["POST", "PUT", "PATCH"] = "POST"
    access_token: SecretStr | None = None
    client_id: str | None = None
    client_secret: SecretStr | None = None
    token_url: str = DEFAULT_TOKEN_URL
    scope: str = ""

    ttl_seconds: Seconds = 30.0
    stale_while_revalidate_seconds: SecondsOrNone = 30.0
    stale_if_error_seconds: SecondsOrNone = 3600.0
    when_expired: Literal["default", "on", "off", "last"] = "default"
    timeout_seconds: Seconds = 5.0
    retry_after_max_seconds: Seconds = 300.0
    refresh: Literal["background", "lazy"] = "background"
    max_concurrent_reads: Annotated[int, Field(ge=1, le=256)] = 16

    # As JSON too it shows no password.
    store: Annotated[str, PlainSerializer(str, when_used="json")] = StoreURL("memory://")
    store_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] = "external_oms"
    # not below 0.1: the pauses between two tries of a process that Redis does not answer are a part of it
    store_bound_seconds: Annotated[float, Field(ge=0.1, le=1e9, allow_inf_nan=False)] = 5.0
    history_rows: Count = 10_000
    history_seconds: Seconds = 30 * 86_400.0

    webhook_secrets: Secrets = ()
    webhook_api_keys: Secrets = ()
    # at most half of the time for which stores remember a delivery id: a replay within the tolerance is then known
    webhook_tolerance_seconds: Annotated[float, Field(gt=0, le=1800, allow_inf_nan=False)] = 300.0
    webhook_max_bytes: Annotated[int, Field(ge=1, le=16 * 1024 * 1024)] = 65_536

    webhook_per_minute: Count = 6000
    max_waiters_per_tenant: Annotated[int, Field(ge=0, le=4096)] = 16
    writes_per_minute: Count = 60
    logins_per_minute: Count = 10
    api_keys: Texts = ()
    dashboard: bool = True
    metrics_open: bool = False
    ofrep_origins: Texts = ()
    max_streams: Annotated[int, Field(ge=0, le=10_000)] = 500
    proxies: Annotated[int, Field(ge=0, le=16)] = 0
    session_secret: SecretStr | None = None
    session_seconds: Seconds = 8 * 3600.0
    environment: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,31}$")] | None = None
    environment_color: Literal["red", "amber", "green", "blue", "purple", "gray"] | None = None
    insecure: bool = False

    def __init__(self, **given: Any) -> None:  # noqa: ANN401 - pydantic's own constructor takes anything and checks it
        """Gather and check the settings.

        Raises:
            SettingsError: A setting is unknown, malformed or contradicts another.
        """
        fields = type(self).model_fields
        refuse_unknown_variables(os.environ, fields, prefix=ENV_PREFIX, also=CONFIG_FILE_VARIABLE)
        try:
            super().__init__(**given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            # Without pydantic's error: it may quote the input, which may be a secret.
            raise settings_error(first, fields, file=_file_of(first["loc"], given)) from None
        self._refuse_contradictions()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - a .env file is the shell's business
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the base's form
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keyword, then environment, then file."""
        return init_settings, env_settings, _TomlFile(settings_cls)

    def _refuse_contradictions(self) -> None:
        if self.ttl_seconds < self.timeout_seconds:
            raise SettingsError(
                "ttl_seconds",
                f"{self.ttl_seconds:g} is below timeout_seconds ({self.timeout_seconds:g}): a value could grow stale "
                "during its own read; raise the one or lower the other",
            )
        if self.tenant is None and not self.tenants:
            raise SettingsError("tenant", "is not set; name the tenant, such as acme-staging, or several in tenants")
        if self.tenant is not None and self.tenants:
            raise SettingsError("tenant", "is set beside tenants; set one of them")
        if self.tenants and (self.access_token or self.client_id or self.client_secret):
            raise SettingsError("tenants", "credentials stand beside it; each tenant has its own, inside its entry")
        for name, reached in self.by_tenant().items():
            where = "tenant" if self.tenant is not None else f"tenants.{name}"
            if not is_tenant_name(name):
                raise SettingsError(
                    where, f"{name[:80]!r} is not a tenant's name: [a-z0-9-], 1 to 63 characters, such as acme-staging"
                )
            check_credentials("" if self.tenant is not None else f"tenants.{name}.", reached)
        self._refuse_shared_addresses()
        self._refuse_weak_secrets()
        self._refuse_ambiguous_identities()

    def _refuse_weak_secrets(self) -> None:
        for number, secret in enumerate(self.webhook_secrets, start=1):
            check_secret("webhook_secrets", secret.get_secret_value(), entry=number)
        for number, key in enumerate(self.webhook_api_keys, start=1):
            check_header_text("webhook_api_keys", key.get_secret_value(), entry=number)
            if len(key.get_secret_value()) < _LEAST_KEY:
                advice = f"entry {number} is shorter than {_LEAST_KEY} characters; try `openssl rand -base64 32`"
                raise SettingsError("webhook_api_keys", advice)
        if self.session_secret is not None:
            check_secret("session_secret", self.session_secret.get_secret_value())

    def _refuse_ambiguous_identities(self) -> None:
        digests: set[str] = set()
        roles: dict[str, str] = {}
        for number, entry in enumerate(self.api_keys, start=1):
            (name, _, rest), problem = entry.partition(":"), ""
            role, _, digest = rest.lower().partition(":")
            if digest == _HASH_OF_NOTHING:
                problem = "is the hash of an empty key; make one with `external-oms keys new`"
            elif digest in digests:
                problem = "has the key of another entry; a key has one name and one role"
            elif roles.setdefault(name, role) != role:
                problem = "gives a name another role than an entry before it; a name has one role"
            if problem:
                raise SettingsError("api_keys", f"entry {number} {problem}")
            digests.add(digest)

    def _refuse_shared_addresses(self) -> None:
        """Two tenants at one address would be one configuration under two names, read with two tenants' tokens."""
        holders: dict[str, str] = {}
        for name, reached in self.by_tenant().items():
            other = holders.setdefault(reached.config_url(name), name)
            if other != name:
                raise SettingsError(
                    f"tenants.{name}.base_url", f"is the address of tenant {other!r} too; does it lack {{tenant}}?"
                )

    def by_tenant(self) -> dict[str, TenantSettings]:
        """Every configured tenant with its own settings, what an entry leaves out taken from the top."""
        shared = {
            name: getattr(self, name)
            for name in ("base_url", "config_path", "write_method", "token_url", "scope")
            if name in self.model_fields_set
        }
        if self.tenant is None:
            return {
                name: entry.model_copy(update={k: v for k, v in shared.items() if k not in entry.model_fields_set})
                for name, entry in self.tenants.items()
            }
        own = {"access_token": self.access_token, "client_id": self.client_id, "client_secret": self.client_secret}
        return {self.tenant: TenantSettings(**shared, **own)}

    @field_validator("store")
    @classmethod
    def _checked_store(cls, given: str) -> str:
        check_store_url(given)
        return StoreURL(given)

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

    @property
    def windows(self) -> Windows:
        """The three windows, as the freshness rules take them."""
        return Windows(self.ttl_seconds, self.stale_while_revalidate_seconds, self.stale_if_error_seconds)

    def replaced(self, **changes: object) -> Self:
        """The same settings with some of them changed, checked anew.

        Raises:
            SettingsError: The changed settings contradict each other.
        """
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


_LEAST_KEY = 8
"""Characters of a webhook key: fewer are found by trying."""

_HASH_OF_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""SHA-256 of an empty key, which every request would show."""
