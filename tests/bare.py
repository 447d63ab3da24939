"""Run by `make bare` with the Python of an environment that holds the wheel without extras; no pytest there.

It imports the package, checks what that brought along, and evaluates the flag against a server of the standard library.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

LATE_ONLY = ("flask", "redis", "click", "standardwebhooks", "prometheus_client", "gunicorn", "pytest")
ABSENT = ("flask", "redis", "click", "standardwebhooks", "prometheus_client", "gunicorn", "pytest")


class ConfigAPI(BaseHTTPRequestHandler):
    """Answers every GET with the document, enabled."""

    paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.paths.append(self.path)
        body = json.dumps({"enabled": True}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def check_imports() -> None:
    import external_oms

    assert "site-packages" in str(external_oms.__file__), f"not the installed wheel: {external_oms.__file__}"
    assert importlib.metadata.version("openfeature-provider-external-oms") == external_oms.__version__
    assert not (early := [name for name in LATE_ONLY if name in sys.modules]), f"imported too early: {early}"
    assert not (there := [name for name in ABSENT if importlib.util.find_spec(name)]), f"not bare: {there}"


def check_evaluation() -> None:
    from openfeature import api

    from external_oms import FLAG_KEY, ExternalOMSProvider, Settings

    server = HTTPServer(("127.0.0.1", 0), ConfigAPI)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = Settings(tenant="acme", base_url=f"http://127.0.0.1:{server.server_port}", access_token="bare")
    try:
        api.set_provider_and_wait(ExternalOMSProvider(settings))
        details = api.get_client().get_boolean_details(FLAG_KEY, default_value=False)
        assert details.value is True, details
        assert details.error_code is None, details
        assert ConfigAPI.paths == ["/v0/config/external_oms"], ConfigAPI.paths
    finally:
        api.shutdown()
        server.shutdown()
        server.server_close()


def check_command() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-m", "external_oms", "status"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2, done
    assert "pip install 'openfeature-provider-external-oms[server]'" in done.stderr, done
    assert "Traceback" not in done.stderr, done


def main() -> None:
    for check in (check_imports, check_evaluation, check_command):
        check()
        sys.stdout.write(f"bare: {check.__name__.removeprefix('check_')} ok\n")


if __name__ == "__main__":
    main()
