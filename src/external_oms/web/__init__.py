"""The face of the web side: the whole server, and the extension for an app of the user's own."""

from __future__ import annotations

from external_oms.web.app import create_app
from external_oms.web.extension import ExternalOMS

__all__ = ["ExternalOMS", "create_app"]
