"""Programs that some tests need from the machine: found, or the test is skipped with the reason and the remedy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

__all__ = ["require_chromium", "require_node", "require_redis"]


def require_chromium() -> str:
    """The path of Chromium."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    return found or pytest.skip("no chromium on the PATH; on Debian: apt install chromium")


def require_node() -> None:
    """Skip where Node.js or npm is missing."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node and npm on the PATH; on Debian: apt install nodejs npm")


def require_redis() -> str:
    """The path of redis-server: of the system, or the one that `make test` unpacks into its virtual environment."""
    for candidate in (shutil.which("redis-server"), str(Path(sys.prefix, "bin", "redis-server"))):
        if candidate is not None and _runs(candidate):
            return candidate
    return pytest.skip(
        "no redis-server on the PATH, and `make` found none for this machine; on Debian: apt install redis-server"
    )


@cache
def _runs(program: str) -> bool:
    try:
        return subprocess.run([program, "--version"], capture_output=True, timeout=30, check=False).returncode == 0
    except OSError:
        return False
