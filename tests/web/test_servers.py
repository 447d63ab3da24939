from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

import pytest

from external_oms.web.servers import worker_count
from tests.support.servers import serving

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
from tests.support.servers import serving

def application(environ, start_response):
    start_response("200 OK", [])
    return [str(worker_count(sys.argv, os.environ, uwsgi_processes=None)).encode()]
"""


@pytest.mark.parametrize(("arguments", "environ"), [(["-w", "2", "--preload"], {}), ([], {"WEB_CONCURRENCY": "2"})])
def test_a_real_gunicorn_leaves_it_where_we_look(tmp_path: Path, arguments: list[str], environ: dict[str, str]) -> None:
    (tmp_path / "tells.py").write_text(TELLS)
    command = [sys.executable, "-m", "gunicorn", "--graceful-timeout", "2", *arguments, "tells"]
    inherited = {"PYTHONPATH": ":".join([str(tmp_path), *filter(None, sys.path)])}
    with (
        serving(command, environ={**inherited, **environ}, log=tmp_path / "log") as server,
        urllib.request.urlopen(server.url, timeout=20) as answer,
    ):
        assert answer.read() == b"2"
