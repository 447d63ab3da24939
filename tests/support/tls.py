"""A certificate for the loopback address, from an authority made for the test."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme

__all__ = ["certificate"]


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's context for 127.0.0.1, and the bundle that trusts it."""
    authority, context, bundle = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), folder / "bundle.pem"
    authority.cert_pem.write_to_path(str(bundle))
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context, bundle
