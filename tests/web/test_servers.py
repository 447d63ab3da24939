from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from time import monotonic, sleep

import pytest

from external_oms.web.servers import worker_count

GUNICORN = {"SERVER_SOFTWARE": "gunicorn/23.0.0"}


@pytest.mark.parametrize(
    ("argv", "environ", "uwsgi", "workers"),
    [
        ([], {}, None, 1),
        (["python", "-w", "4"], {}, None, 1),
        (["gunicorn", "app:app"], GUNICORN, None, 1),
        (["gunicorn", "-w", "4", "app:app"], GUNICORN, None, 4),
        (["gunicorn", "-w4", "app:app"], GUNICORN, None, 4),
        (["gunicorn", "-w=4", "app:app"], GUNICORN, None, 4),
        (["gunicorn", "--workers", "3"], GUNICORN, None, 3),
        (["gunicorn", "--workers=3"], GUNICORN, None, 3),
        (["gunicorn", "-w", "2", "--workers=5"], GUNICORN, None, 5),
        (["gunicorn", "-w"], GUNICORN, None, 1),
        (["gunicorn", "-w", "many"], GUNICORN, None, 1),
        (["gunicorn", "-w", "0"], GUNICORN, None, 1),
        (["gunicorn", "--worker-class", "gevent"], GUNICORN, None, 1),
        (["gunicorn"], {**GUNICORN, "WEB_CONCURRENCY": "6"}, None, 6),
        (["gunicorn"], {"WEB_CONCURRENCY": "6"}, None, 1),
        (["gunicorn", "-w", "2"], {**GUNICORN, "WEB_CONCURRENCY": "6"}, None, 2),
        (["gunicorn"], {**GUNICORN, "GUNICORN_CMD_ARGS": "--bind=:80 --workers 7"}, None, 7),
        (["gunicorn"], {**GUNICORN, "GUNICORN_CMD_ARGS": "--bind='unclosed"}, None, 1),
        (["uwsgi"], {}, 8, 8),
        (["uwsgi"], {}, 0, 1),
    ],
)
def test_the_number_of_workers_is_read_where_the_server_leaves_it(
    argv: list[str], environ: dict[str, str], uwsgi: int | None, workers: int
) -> None:
    assert worker_count(argv, environ, uwsgi_processes=uwsgi) == workers


TELLS = """
import os, sys
from external_oms.web.servers import worker_count

def application(environ, start_response):
    start_response("200 OK", [])
    return [str(worker_count(sys.argv, os.environ, uwsgi_processes=None)).encode()]
"""


def asked(port: int) -> str:
    """What the server answers, as soon as it does."""
    until = monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            assert monotonic() < until
            sleep(0.02)


@pytest.mark.parametrize(("arguments", "environ"), [(["-w", "2", "--preload"], {}), ([], {"WEB_CONCURRENCY": "2"})])
def test_a_real_gunicorn_leaves_it_where_we_look(tmp_path: Path, arguments: list[str], environ: dict[str, str]) -> None:
    (tmp_path / "tells.py").write_text(TELLS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = ["-b", f"127.0.0.1:{port}", "--chdir", str(tmp_path), *arguments, "tells"]
    inherited = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *given], env={**inherited, **environ}, stderr=subprocess.DEVNULL
    ) as server:
        try:
            assert asked(port) == "2"
        finally:
            server.terminate()
            server.wait(10)
