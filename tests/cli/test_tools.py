from __future__ import annotations

import hashlib
import http.client
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from external_oms.cli.base import ExitCode
from external_oms.emulator import ConfigAPIEmulator
from external_oms.settings import ENV_PREFIX
from external_oms.signature import check_secret, verify
from tests.support.cli import in_a_terminal, one_line, run
from tests.support.ports import free_port
from tests.support.web import SECRET


def test_a_new_key_is_shown_once_with_the_entry_that_recognises_it() -> None:
    made = json.loads(run("keys", "new", "--name", "ops", "--role", "operator", "--json").stdout)
    name, role, digest = made["entry"].split(":")
    assert (name, role, digest) == ("ops", "operator", hashlib.sha256(made["key"].encode()).hexdigest())
    key, entry = run("keys", "new", "--name", "ops", "--role", "viewer").stdout.split()
    assert key.startswith("key=oms_")
    assert entry.startswith("entry=ops:viewer:")
    assert key.removeprefix("key=") != made["key"]


def test_a_key_with_an_impossible_name_or_role_is_refused() -> None:
    assert run("keys", "new", "--name", "a:b", "--role", "viewer").exit_code == ExitCode.REFUSED
    assert run("keys", "new", "--name", "ops", "--role", "root").exit_code == ExitCode.REFUSED


def test_in_a_terminal_a_new_key_is_told_with_what_to_do_with_it() -> None:
    code, said = in_a_terminal(["keys", "new", "--name", "ops", "--role", "admin"], [])
    assert code == 0
    key, entry = re.findall(r"^  (\S+)\r?$", said, re.MULTILINE)
    assert entry == f"ops:admin:{hashlib.sha256(key.encode()).hexdigest()}"
    assert "shown this once" in said


class Receiver(http.server.BaseHTTPRequestHandler):
    """Takes deliveries as anybody's server would, and keeps them."""

    got: ClassVar[list[tuple[dict[str, str], bytes]]] = []
    status: ClassVar[int] = 200
    answer: ClassVar[bytes] = b'{"taken": true}'

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got.append((dict(self.headers), body))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing."""


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Receiver, "got", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/hook"
        server.shutdown()
        thread.join()


def test_a_delivery_is_signed_with_no_other_setting_than_the_secret(
    receiver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}WEBHOOK_SECRETS", SECRET)
    result = run("webhook", "send", "--url", receiver, "--tenant", "acme", "--id", "msg_1")
    assert result.exit_code == 0
    assert result.stdout.startswith("200 in ")
    ((headers, body),) = Receiver.got
    known = verify(body, headers, secrets=[SECRET], tolerance_seconds=60, now_wall=time.time())
    assert (known.delivery_id, json.loads(body)["tenant"]) == ("msg_1", "acme")


def test_a_key_is_shown_as_a_bearer_where_no_secret_is_set(receiver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}WEBHOOK_API_KEYS", "key-1,key-2")
    assert run("webhook", "send", "--url", receiver).exit_code == 0
    ((headers, body),) = Receiver.got
    assert headers["Authorization"] == "Bearer key-1"
    assert "tenant" not in json.loads(body)


def test_the_secret_may_stand_in_a_file(receiver: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n", encoding="utf-8")
    assert run("webhook", "send", "--url", receiver, "--secret-file", str(tmp_path / "secret")).exit_code == 0
    assert run("webhook", "send", "--url", receiver, "--bearer", "--secret-file", "-", stdin="key-3\n").exit_code == 0
    (signed, body), (shown, _) = Receiver.got
    assert verify(body, signed, secrets=[SECRET], tolerance_seconds=60, now_wall=time.time())
    assert shown["Authorization"] == "Bearer key-3"


def test_the_secret_and_the_tenant_come_from_the_settings_too(
    api: ConfigAPIEmulator, receiver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "oms.toml").write_text(f'webhook_secrets = ["{SECRET}"]\n', encoding="utf-8")
    monkeypatch.setenv(f"{ENV_PREFIX}CONFIG_FILE", str(tmp_path / "oms.toml"))
    assert run("webhook", "send", "--url", receiver).exit_code == 0
    ((_, body),) = Receiver.got
    assert json.loads(body)["tenant"] == "acme-staging"


def test_an_answer_that_is_no_success_is_shown_and_exits_with_1(receiver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}WEBHOOK_SECRETS", SECRET)
    monkeypatch.setattr(Receiver, "status", 401)
    result = run("webhook", "send", "--url", receiver)
    assert result.exit_code == ExitCode.FAILED
    assert result.stdout.startswith("401 in ")


@pytest.mark.parametrize(
    ("arguments", "environ", "word"),
    [
        ([], {}, "WEBHOOK_SECRETS"),
        (["--bearer"], {}, "WEBHOOK_API_KEYS"),
        ([], {"WEBHOOK_SECRETS": "whsec_short"}, "whsec_"),
        ([], {"WEBHOOK_SECRETS": "[broken"}, "JSON"),
        (["--bearer"], {"WEBHOOK_API_KEYS": "naïve"}, "ASCII"),
        (["--id", "a b"], {"WEBHOOK_SECRETS": SECRET}, "id"),
        (["--bearer", "--url", "http://example.com/hook"], {"WEBHOOK_API_KEYS": "k"}, "https"),
        (["--url", "ftp://example.com/hook"], {"WEBHOOK_SECRETS": SECRET}, "--url"),
        (["--url", "http://[/hook"], {"WEBHOOK_SECRETS": SECRET}, "--url"),
    ],
)
def test_a_delivery_that_cannot_be_genuine_is_not_sent(
    receiver: str, monkeypatch: pytest.MonkeyPatch, arguments: list[str], environ: dict[str, str], word: str
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(ENV_PREFIX + name, value)
    result = run("webhook", "send", "--url", receiver, *arguments)
    assert result.exit_code == ExitCode.REFUSED
    assert word in result.stderr
    for value in environ.values():
        assert len(value) < 3 or value not in result.output
    assert Receiver.got == []


def test_nobody_there_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}WEBHOOK_SECRETS", SECRET)
    result = run("webhook", "send", "--url", f"http://127.0.0.1:{free_port()}/hook")
    assert result.exit_code == ExitCode.FAILED
    assert "no connection" in one_line(result.stderr)


def test_a_secret_is_made_anew_each_time_in_the_form_that_is_required() -> None:
    first, second = (one_line(run("webhook", "secret").stdout).strip() for _ in range(2))
    assert first != second
    check_secret(first)
    code, said = in_a_terminal(["webhook", "secret"])
    assert code == 0
    check_secret(said.splitlines()[-1])
    assert "EXTERNAL_OMS_WEBHOOK_SECRETS" in said


def test_a_response_cannot_control_the_terminal(receiver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}WEBHOOK_SECRETS", SECRET)
    monkeypatch.setattr(Receiver, "answer", "\x1b]0;title\x07 \u202eabc".encode())
    result = run("webhook", "send", "--url", receiver)
    assert result.stdout.splitlines()[1] == r"\u001b]0;title\u0007 \u202eabc"
