"""Where the command keeps its state when nobody said where: in the user's state directory, apart for each platform."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress

from platformdirs import user_state_path

from external_oms.settings import Settings

__all__ = ["with_place"]


def with_place(settings: Settings) -> Settings:
    """The same settings, with a file of the user's own for the store where they name none.

    The file goes by the addresses that the tenants are read from. So a value that was read from an emulator, or from
    another stage, is never taken for one of the tenant of the same name elsewhere.
    """
    if "store" in settings.model_fields_set:
        return settings
    read_from = {name: reached.config_url(name) for name, reached in settings.by_tenant().items()}
    digest = hashlib.sha256(json.dumps(read_from, sort_keys=True).encode()).hexdigest()[:12]
    path = user_state_path("external-oms", appauthor=False) / f"state-{digest}.db"
    with suppress(OSError):  # the store says what is wrong with the place
        # the store makes one level alone; the mode is that of the XDG Base Directory Specification
        path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return settings.replaced(store=f"sqlite:///{path}")
