from __future__ import annotations

import http.client
import http.server
import json
import re
import shlex
import signal
import socket
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from external_oms.cli.base import ExitCode
from external_oms.emulator import ConfigAPIEmulator
from external_oms.settings import ENV_PREFIX
from external_oms.signature import check_secret
from tests.support.cli import START_SECONDS, one_line, processes_of, run, running
from tests.support.ports import free_port
from tests.support.servers import REPOSITORY, read_until, started
from tests.support.waiting import wait_until
from tests.support.web import ENTRIES, SECRET


def exported(lines: Sequence[str]) -> dict[str, str]:
    """The variables that a shell would have after these lines."""
    words = [word for line in lines for word in shlex.split(line, comments=True)]
    return dict(word.split("=", 1) for word in words if word != "export")


def test_emulate_prints_settings_that_work_and_ends_cleanly(monkeypatch: pytest.MonkeyPatch) -> None:
    with running("emulate", "--enabled", "--shape", "bare") as emulating:
        for name, value in exported(read_until(emulating.stdout, "DELETE")).items():
            monkeypatch.setenv(name, value)
        assert json.loads(run("status", "--json").stdout)["enabled"] is True
        emulating.send_signal(signal.SIGTERM)
        _, stderr = emulating.communicate(timeout=START_SECONDS)
    assert (emulating.returncode, stderr) == (0, "")


def test_the_application_of_the_readme_starts_with_what_emulate_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(
        r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    for line in re.findall(r"^.*(?:emulator|ConfigAPIEmulator).*\n", example, re.MULTILINE):
        example = example.replace(line, "")
    assert "app, settings)" in example
    (tmp_path / "app.py").write_text(example.replace("app, settings)", "app)"), encoding="utf-8")
    with running("emulate", "--enabled") as emulating:
        for name, value in exported(read_until(emulating.stdout, "DELETE")).items():
            monkeypatch.setenv(name, value)
        port = str(free_port())
        with started([sys.executable, "-m", "flask", "--app", "app", "run", "--port", port], cwd=tmp_path) as flask:
            read_until(flask.stderr, "Running on")
            order = urllib.request.Request(f"http://127.0.0.1:{port}/orders", method="POST")
            with urllib.request.urlopen(order, timeout=START_SECONDS) as answer:
                assert json.loads(answer.read()) == {"external": True}
            sent = run("webhook", "send", "--url", f"http://127.0.0.1:{port}/webhooks/external-oms")
            assert (sent.exit_code, sent.stdout[:3]) == (0, "200"), sent.output


def test_emulate_several_tenants_prints_them_as_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    with running("emulate", "--tenant", "acme", "--tenant", "globex") as emulating:
        lines = read_until(emulating.stdout, "DELETE")
        emulating.send_signal(signal.SIGINT)
        emulating.communicate(timeout=START_SECONDS)
    given = exported(lines)
    assert set(json.loads(given[f"{ENV_PREFIX}TENANTS"])) == {"acme", "globex"}
    check_secret(given[f"{ENV_PREFIX}WEBHOOK_SECRETS"])
    assert emulating.returncode == 0


def test_emulate_refuses_a_port_that_is_taken_and_a_name_that_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as line:
        taken = run("emulate", "--port", str(line.getsockname()[1]))
    assert taken.exit_code == ExitCode.FAILED
    assert "--port" in one_line(taken.stderr)
    assert run("emulate", "--tenant", "No Name").exit_code == ExitCode.REFUSED


def test_serve_without_credentials_is_refused_and_names_the_setting(api: ConfigAPIEmulator) -> None:
    result = run("serve")
    assert result.exit_code == ExitCode.REFUSED
    assert "webhook_secrets" in one_line(result.stderr)


@pytest.mark.parametrize("bind", ["0.0.0.0:8080", "example.com:8080", "[::]:8080", ":8080", "fd://7"])
def test_serve_insecure_is_for_loopback_only(api: ConfigAPIEmulator, bind: str) -> None:
    result = run("serve", "--insecure", "--bind", bind)
    assert result.exit_code == ExitCode.REFUSED
    assert "loopback" in result.stderr


@pytest.mark.parametrize(
    "bind", ["127.0.0.1", "127.0.0.1:http", "127.0.0.1:99999", "a/b:80", "http://127.0.0.1", "tcp://h:80", "fd://x"]
)
def test_serve_refuses_a_malformed_address_and_shows_the_forms(api: ConfigAPIEmulator, bind: str) -> None:
    result = run("serve", "--insecure", "--bind", bind)
    assert result.exit_code == ExitCode.REFUSED
    assert f"Invalid value for --bind: '{bind}' given; must be host:port, [ipv6]:port," in result.stderr


@pytest.mark.parametrize(
    ("bind", "problem"),
    [
        ("127.0.0.1:{}", "it is in use"),
        ("192.0.2.1:{}", "this host has no such address"),
        ("nowhere.invalid:{}", "the host is unknown"),
    ],
)
def test_serve_says_why_it_cannot_bind(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch, bind: str, problem: str
) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}WEBHOOK_SECRETS", SECRET)
    monkeypatch.setenv(f"{ENV_PREFIX}API_KEYS", ENTRIES[0])
    with socket.create_server(("127.0.0.1", 0)) as line:
        bind = bind.format(line.getsockname()[1])
        result = run("serve", "--bind", bind)
    assert result.exit_code == ExitCode.FAILED
    assert one_line(result.stderr) == (f"Error: cannot bind to {bind}: {problem}; choose another address with --bind\n")


@pytest.mark.parametrize("preload", [[], ["--preload"]])
def test_serve_answers_from_several_processes_and_ends_while_a_stream_is_open(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch, state_home: Path, preload: list[str]
) -> None:
    port = free_port()
    key, entry = run("keys", "new", "--name", "ops", "--role", "admin").stdout.split()
    monkeypatch.setenv(f"{ENV_PREFIX}API_KEYS", entry.removeprefix("entry="))
    monkeypatch.setenv(f"{ENV_PREFIX}WEBHOOK_SECRETS", SECRET)
    with running("serve", "--bind", f"127.0.0.1:{port}", "--workers", "2", *preload) as serving:
        read_until(serving.stderr, "Booting worker")
        read_until(serving.stderr, "Booting worker")
        url = f"http://127.0.0.1:{port}/webhooks/external-oms"
        api.set_enabled(None, True)
        first = run("webhook", "send", "--url", url, "--id", "msg_7")
        again = run("webhook", "send", "--url", url, "--id", "msg_7")
        assert json.loads(first.stdout.splitlines()[1])["enabled"] is True
        assert json.loads(again.stdout.splitlines()[1])["duplicate"] is True
        assert list((state_home / "external-oms").glob("state-*.db"))
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
        line.request("GET", "/api/v1/events", headers={"X-API-Key": key.removeprefix("key=")})
        stream = line.getresponse()
        assert stream.status == 200
        stream.readline()
        serving.send_signal(signal.SIGTERM)
        serving.communicate(timeout=START_SECONDS)
        line.close()
        assert serving.returncode == 0
        wait_until(lambda: processes_of(serving.pid) == [])
