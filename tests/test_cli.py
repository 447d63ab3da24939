from __future__ import annotations

import hashlib
import http.client
import http.server
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner, Result

import external_oms
from external_oms.cli import frame, main
from external_oms.cli.endings import endable, uninterrupted
from external_oms.cli.frame import Code
from external_oms.cli.reaching import environment_of
from external_oms.cli.stage import Stage
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.entry import Entry
from external_oms.settings import ENV_PREFIX
from external_oms.signature import verify
from external_oms.stores.memory import MemoryStore
from external_oms.wiring import build_service
from tests.support.ports import free_port
from tests.support.servers import read_until, started
from tests.support.waiting import wait_until

SECRET = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
START_SECONDS = 30.0


@pytest.fixture(autouse=True)
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own state stays out of it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator() as emulator:
        for name, value in environment_of(emulator).items():
            monkeypatch.setenv(name, value)
        yield emulator


def run(*arguments: str, stdin: str | None = None) -> Result:
    """The command in this process; stdin, stdout and stderr are pipes."""
    result = CliRunner().invoke(main, arguments, input=stdin)
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def running(*arguments: str, environ: Mapping[str, str] | None = None) -> AbstractContextManager[subprocess.Popen[str]]:
    """The command as a process of its own."""
    return started([sys.executable, "-m", "external_oms", *arguments], environ=environ)


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text


def test_the_version_is_that_of_the_distribution() -> None:
    assert run("--version").output == f"external-oms {external_oms.__version__}\n"


# -- status -----------------------------------------------------------------------------------------------------------


def test_status_reads_the_api_where_nothing_is_known_and_then_shows_what_the_store_knows(
    api: ConfigAPIEmulator, state_home: Path
) -> None:
    api.set_enabled(None, True)
    first, second = run("status"), run("status")
    assert first.exit_code == second.exit_code == 0
    heads, row = (line.split() for line in first.stdout.splitlines())
    assert heads[:3] == ["TENANT", "FLAG", "FRESHNESS"]
    assert row[:3] == ["acme-staging", "on", "fresh"]
    assert row[-1] == "api"
    assert second.stdout.splitlines()[1].split()[-1] == "store"
    assert api.reads() == 1
    assert list((state_home / "external-oms").glob("state-*.db"))


def test_status_as_json_is_one_object_for_each_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    with ConfigAPIEmulator(("acme", "globex")) as emulator:
        emulator.set_enabled("globex", True)
        for name, value in environment_of(emulator).items():
            monkeypatch.setenv(name, value)
        states = [json.loads(line) for line in run("status", "--json").stdout.splitlines()]
        (alone,) = [json.loads(line) for line in run("status", "--json", "--tenant", "globex").stdout.splitlines()]
    assert [(state["tenant"], state["enabled"], state["freshness"]) for state in states] == [
        ("acme", False, "fresh"),
        ("globex", True, "fresh"),
    ]
    assert alone["tenant"] == "globex"


def test_status_says_why_reads_fail_and_exits_with_1_where_nothing_may_be_served(api: ConfigAPIEmulator) -> None:
    api.fault(None, Fault(status=503, times=None))
    result = run("status")
    assert result.exit_code == Code.FAILED
    assert "expired" in result.stdout
    assert "answered 503" in result.stdout.splitlines()[-1]


def test_a_generation_of_thirteen_digits_is_shown_whole(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generations in Redis are times in milliseconds; people compare them with what a delivery was answered."""
    generation = 1_780_000_000_123
    store = MemoryStore(entries={"acme-staging": Entry(generation=generation)})
    monkeypatch.setattr(frame, "build_service", partial(build_service, store=store))
    assert json.loads(run("status", "--json").stdout)["generation"] == generation
    assert str(generation) in run("status").stdout


def test_a_value_of_one_platform_is_never_shown_for_a_tenant_of_the_same_name_on_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = []
    for enabled in (True, False):
        with ConfigAPIEmulator(enabled=enabled) as emulator:
            for name, value in environment_of(emulator).items():
                monkeypatch.setenv(name, value)
            said.append(json.loads(run("status", "--json").stdout)["enabled"])
    assert said == [True, False]


def test_an_unknown_tenant_is_refused_with_2_in_one_line(api: ConfigAPIEmulator) -> None:
    result = run("status", "--tenant", "globex")
    assert result.exit_code == Code.REFUSED
    assert "globex" in one_line(result.stderr)


@pytest.mark.parametrize("command", [["status"], ["watch"], ["history"], ["enable", "--yes"], ["serve"]])
def test_a_wrong_setting_is_refused_with_2_in_one_line(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch, command: Sequence[str]
) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}TTL_SECONDS", "soon")
    result = run(*command)
    assert result.exit_code == Code.REFUSED
    assert one_line(result.stderr).startswith("Error: ttl_seconds: 'soon' given;")
    assert result.stdout == ""


def test_a_store_that_cannot_be_used_is_told_in_one_line(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv(f"{ENV_PREFIX}STORE", f"sqlite:///{tmp_path}/file/state.db")
    result = run("status")
    assert result.exit_code == Code.FAILED
    assert "is not a directory" in one_line(result.stderr)


def test_a_history_that_cannot_be_read_is_not_told_as_an_empty_one(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}STORE", f"redis://127.0.0.1:{free_port()}/0")
    result = run("history")
    assert result.exit_code == Code.FAILED
    assert "the history cannot be read" in result.stderr
    assert "Nothing has happened" not in result.stderr


def test_a_reader_who_leaves_early_is_no_error(api: ConfigAPIEmulator) -> None:
    command = f"set -o pipefail; {sys.executable} -m external_oms status | head -c 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert done.stderr == ""
    assert done.returncode in {Code.DONE, Code.UNREAD}


def test_a_stdout_that_nobody_reads_ends_the_command_with_141(api: ConfigAPIEmulator) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "external_oms", "status"]
    with os.fdopen(writing, "wb") as nobody:
        done = subprocess.run(
            command, stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=START_SECONDS, check=False
        )
    assert (done.returncode, done.stderr) == (Code.UNREAD, "")


def test_a_terminal_that_knows_no_arrow_ends_no_command(api: ConfigAPIEmulator) -> None:
    command = [sys.executable, "-m", "external_oms", "status"]
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    api.fault(None, Fault(status=503, times=None))
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert (done.returncode, done.stderr) == (Code.FAILED, "")


# -- enable, disable --------------------------------------------------------------------------------------------------


def test_enable_writes_reads_back_and_leaves_who_and_why_in_the_history(api: ConfigAPIEmulator) -> None:
    result = run("enable", "--yes", "--reason", "go live")
    assert result.exit_code == 0
    assert "acme-staging external_oms_enabled is on (it was off; read back at generation 1" in one_line(result.stdout)
    assert api.enabled() is True
    rows = [json.loads(line) for line in run("history", "--json").stdout.splitlines()]
    (write,) = [row for row in rows if row["cause"] == "write"]
    assert write["actor"].startswith("cli:")
    assert write["detail"].endswith("reason: go live")


def test_a_pipe_without_yes_is_refused_and_nothing_is_asked_of_the_api(api: ConfigAPIEmulator) -> None:
    result = run("enable", stdin="y\n")
    assert result.exit_code == Code.REFUSED
    assert "--yes" in one_line(result.stderr)
    assert (api.reads(), api.writes()) == (0, 0)


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(api: ConfigAPIEmulator) -> None:
    result = run("enable", "--dry-run")
    assert result.exit_code == 0
    assert "would go from off to on" in result.stdout
    assert f'POST {api.origin}/acme-staging/v0/config/external_oms with {{"enabled": true}}' in result.stdout
    assert (api.writes(), api.enabled()) == (0, False)


def test_a_value_that_stands_already_is_not_written_again(api: ConfigAPIEmulator) -> None:
    result = run("disable", "--yes")
    assert result.exit_code == 0
    assert "is off already; nothing was written" in result.stdout
    assert api.writes() == 0


def test_a_conflict_is_told_in_words_with_1(api: ConfigAPIEmulator) -> None:
    api.fault(None, Fault(status=409, where="write"))
    result = run("enable", "--yes")
    assert result.exit_code == Code.FAILED
    assert "409" in one_line(result.stderr)
    assert "cannot be changed in its present state" in result.stderr


def test_a_write_without_an_answer_that_cannot_be_read_back_exits_with_3(api: ConfigAPIEmulator) -> None:
    api.fault(None, Fault(dropped="headers", where="write"))
    api.fault(None, Fault(status=500, times=None, where="read"))
    result = run("enable", "--yes")
    assert result.exit_code == Code.UNKNOWN
    assert "The present value is not known" in result.stderr
    assert "it may have changed" in result.stderr.splitlines()[-1]


def test_a_write_without_an_answer_that_can_be_read_back_is_done(api: ConfigAPIEmulator) -> None:
    api.fault(None, Fault(dropped="headers", where="write"))
    result = run("enable", "--yes")
    assert result.exit_code == 0
    assert "is on (it was off" in result.stdout


def test_a_value_that_was_taken_and_is_not_seen_yet_exits_with_3(api: ConfigAPIEmulator) -> None:
    api.fault(None, Fault(lag_seconds=30.0))
    result = run("enable", "--yes")
    assert result.exit_code == Code.UNKNOWN
    assert "still answers the old one" in one_line(result.stderr)


def test_without_a_present_value_a_dry_run_fails(api: ConfigAPIEmulator) -> None:
    api.fault(None, Fault(status=500, times=None, where="read"))
    result = run("enable", "--dry-run")
    assert result.exit_code == Code.FAILED
    assert "500" in one_line(result.stderr)


@pytest.mark.parametrize("reason", ["x" * 501, "two\nlines"])
def test_a_reason_is_one_line_of_bounded_length(api: ConfigAPIEmulator, reason: str) -> None:
    assert run("enable", "--yes", "--reason", reason).exit_code == Code.REFUSED
    assert api.writes() == 0


def in_a_terminal(arguments: Sequence[str], answers: Sequence[tuple[str, str]]) -> tuple[int, str]:
    """Run the command in a terminal; to each question that is awaited, the answer is typed."""
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover - another process
        os.execv(sys.executable, [sys.executable, "-m", "external_oms", *arguments])  # noqa: S606 - no shell is wanted
    said, until = "", time.monotonic() + START_SECONDS
    waiting = list(answers)
    try:
        while time.monotonic() < until:
            if not select.select([terminal], [], [], 0.5)[0]:
                continue
            try:
                chunk = os.read(terminal, 4096).decode()
            except OSError:  # the other end has closed
                break
            said += chunk
            if not chunk:
                break
            if waiting and waiting[0][0] in said:
                os.write(terminal, waiting.pop(0)[1].encode())
        assert not waiting, f"never asked: {waiting}; said: {said}"
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said


def test_in_a_terminal_the_confirmation_names_tenant_old_and_new_value_and_asks_why(api: ConfigAPIEmulator) -> None:
    question = "Switch external_oms_enabled of acme-staging from off to on? [y/N]"
    code, said = in_a_terminal(["enable"], [(question, "y\n"), ("Why?", "ticket 4711\n")])
    assert code == 0, said
    assert api.enabled() is True
    assert "ticket 4711" in run("history").stdout


def test_in_a_terminal_no_is_no(api: ConfigAPIEmulator) -> None:
    code, said = in_a_terminal(["enable"], [("[y/N]", "n\n")])
    assert (code, api.writes()) == (Code.FAILED, 0), said


def test_a_terminal_gets_a_table_in_colour(api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    code, said = in_a_terminal(["status"], [])
    assert code == 0
    assert re.search(r"\x1b\[1;31moff *\x1b\[0m", said)


def test_a_narrow_terminal_is_shown_every_word_in_full(api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    run("enable", "--yes", "--reason", "a reason that is rather long")
    for command, words in (
        (["status"], ["acme-staging", "GENERATION", "store"]),
        (["history"], ["written", "cli:", "rather"]),
    ):
        code, said = in_a_terminal(command, [])
        assert code == 0
        assert all(word in said for word in words), said


# -- watch, history ---------------------------------------------------------------------------------------------------


def test_watch_shows_what_another_process_does_and_ends_cleanly_on_ctrl_c(api: ConfigAPIEmulator) -> None:
    with running("watch", "--json") as watching:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        assert (first["tenant"], first["enabled"]) == ("acme-staging", False)
        assert run("enable", "--yes").exit_code == 0
        line = read_until(watching.stdout, '"enabled": true')[-1]
        assert json.loads(line)["generation"] == 1
        watching.send_signal(signal.SIGINT)
        _, stderr = watching.communicate(timeout=START_SECONDS)
    assert (watching.returncode, stderr) == (0, "")


def test_watch_tells_a_row_of_failures_once_for_people(api: ConfigAPIEmulator) -> None:
    with running("watch", environ={f"{ENV_PREFIX}TTL_SECONDS": "1", f"{ENV_PREFIX}TIMEOUT_SECONDS": "1"}) as watching:
        read_until(watching.stdout, "fresh")
        before = api.reads()
        api.fault(None, Fault(status=503, times=None, where="read"))
        assert "answered 503" in read_until(watching.stdout, "reads fail")[-1]
        wait_until(lambda: api.reads() >= before + 2)
        api.clear()
        told = read_until(watching.stdout, " fresh ")
        watching.send_signal(signal.SIGTERM)
        watching.communicate(timeout=START_SECONDS)
    assert sum("reads fail" in line and "fresh" in line for line in told) <= 1
    assert len(told) <= 3, told
    assert watching.returncode == 0


def test_history_is_newest_first_and_bounded(api: ConfigAPIEmulator) -> None:
    run("enable", "--yes")
    run("disable", "--yes")
    rows = [json.loads(line) for line in run("history", "--json").stdout.splitlines()]
    assert [row["id"] for row in rows] == sorted((row["id"] for row in rows), reverse=True)
    assert len(rows) > 2
    (newest,) = [json.loads(line) for line in run("history", "--json", "--limit", "1").stdout.splitlines()]
    assert newest == rows[0]
    heads, *lines = run("history", "--tenant", "acme-staging").stdout.splitlines()
    assert heads.split() == ["WHEN", "TENANT", "WHAT", "FLAG", "BY", "TOOK", "DETAIL"]
    assert len(lines) == len(rows)


def test_an_empty_history_says_so(api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("history")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "Nothing has happened yet" in result.stderr
    monkeypatch.setenv(f"{ENV_PREFIX}STORE", "memory://")
    assert "memory://" in run("history").stderr


# -- keys, webhook ----------------------------------------------------------------------------------------------------


def test_a_new_key_is_shown_once_with_the_entry_that_recognises_it() -> None:
    made = json.loads(run("keys", "new", "--name", "ops", "--role", "operator", "--json").stdout)
    name, role, digest = made["entry"].split(":")
    assert (name, role, digest) == ("ops", "operator", hashlib.sha256(made["key"].encode()).hexdigest())
    key, entry = run("keys", "new", "--name", "ops", "--role", "viewer").stdout.split()
    assert key.startswith("key=oms_")
    assert entry.startswith("entry=ops:viewer:")
    assert key.removeprefix("key=") != made["key"]


def test_a_key_with_an_impossible_name_or_role_is_refused() -> None:
    assert run("keys", "new", "--name", "a:b", "--role", "viewer").exit_code == Code.REFUSED
    assert run("keys", "new", "--name", "ops", "--role", "root").exit_code == Code.REFUSED


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

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got.append((dict(self.headers), body))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b'{"taken": true}')

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
    assert result.exit_code == Code.FAILED
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
    assert result.exit_code == Code.REFUSED
    assert word in result.stderr
    for value in environ.values():
        assert len(value) < 3 or value not in result.output
    assert Receiver.got == []


def test_nobody_there_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}WEBHOOK_SECRETS", SECRET)
    result = run("webhook", "send", "--url", f"http://127.0.0.1:{free_port()}/hook")
    assert result.exit_code == Code.FAILED
    assert "no connection" in one_line(result.stderr)


# -- emulate, serve ---------------------------------------------------------------------------------------------------


def test_emulate_prints_settings_that_work_and_ends_cleanly(monkeypatch: pytest.MonkeyPatch) -> None:
    with running("emulate", "--enabled", "--shape", "bare") as emulating:
        lines = read_until(emulating.stdout, "DELETE")
        for line in lines:
            if line.startswith("export "):
                name, _, value = line.removeprefix("export ").partition("=")
                monkeypatch.setenv(name, value.strip("'"))
        assert json.loads(run("status", "--json").stdout)["enabled"] is True
        emulating.send_signal(signal.SIGTERM)
        _, stderr = emulating.communicate(timeout=START_SECONDS)
    assert (emulating.returncode, stderr) == (0, "")


def test_emulate_several_tenants_prints_them_as_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    with running("emulate", "--tenant", "acme", "--tenant", "globex") as emulating:
        lines = read_until(emulating.stdout, "DELETE")
        emulating.send_signal(signal.SIGINT)
        emulating.communicate(timeout=START_SECONDS)
    (given,) = [line for line in lines if line.startswith(f"export {ENV_PREFIX}TENANTS=")]
    assert set(json.loads(given.partition("=")[2].strip("'"))) == {"acme", "globex"}
    assert emulating.returncode == 0


def test_emulate_refuses_a_port_that_is_taken_and_a_name_that_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as line:
        taken = run("emulate", "--port", str(line.getsockname()[1]))
    assert taken.exit_code == Code.FAILED
    assert "--port" in one_line(taken.stderr)
    assert run("emulate", "--tenant", "No Name").exit_code == Code.REFUSED


def test_serve_without_credentials_is_refused_and_names_the_setting(api: ConfigAPIEmulator) -> None:
    result = run("serve")
    assert result.exit_code == Code.REFUSED
    assert "webhook_secrets" in one_line(result.stderr)


@pytest.mark.parametrize("bind", ["0.0.0.0:8080", "example.com:8080", "[::]:8080", ":8080", "fd://7"])
def test_serve_insecure_is_for_loopback_only(api: ConfigAPIEmulator, bind: str) -> None:
    result = run("serve", "--insecure", "--bind", bind)
    assert result.exit_code == Code.REFUSED
    assert "loopback" in result.stderr


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.0.0.1:http", "127.0.0.1:99999", "a/b:80"])
def test_serve_refuses_an_address_that_is_none(api: ConfigAPIEmulator, bind: str) -> None:
    assert run("serve", "--insecure", "--bind", bind).exit_code == Code.REFUSED


def test_serve_says_that_its_port_is_taken(api: ConfigAPIEmulator) -> None:
    with socket.create_server(("127.0.0.1", 0)) as line:
        result = run("serve", "--insecure", "--bind", f"127.0.0.1:{line.getsockname()[1]}")
    assert result.exit_code == Code.FAILED
    assert "--bind" in one_line(result.stderr)


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


def processes_of(session: int) -> list[str]:
    """The processes of a session that live; those that only wait to be reaped do not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, _, its_session = stat.read_text().rpartition(") ")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(stat.parent.name)
    return found


# -- demo -------------------------------------------------------------------------------------------------------------


def traces(place: Path) -> list[Path]:
    return list(place.glob("external-oms-demo-*"))


def test_the_demo_checks_itself_and_leaves_nothing_behind(tmp_path: Path) -> None:
    environ = {"TMPDIR": str(tmp_path), f"{ENV_PREFIX}TTL_SECONDS": "nonsense of the user's, which the demo reads not"}
    with running("demo", "--check", environ=environ) as playing:
        said, stderr = playing.communicate(timeout=START_SECONDS)
    assert (playing.returncode, stderr) == (0, "")
    before, after = re.findall(r"worker (\d+) off", said), re.findall(r"worker (\d+) on ", said)
    assert len(set(after)) == 2
    assert set(before) == set(after)
    assert "→ 200" in said
    assert "Every worker followed" in said
    assert traces(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_stays_up_with_what_to_try_until_it_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    with running("demo", environ={"TMPDIR": str(tmp_path)}) as playing:
        lines = [line.strip() for line in read_until(playing.stdout, "/faults")]
        given = dict(pair.split("=", 1) for line in lines if re.match(r"[A-Z_]+=", line) for pair in line.split())
        line = http.client.HTTPConnection(given["SERVER"].removeprefix("http://"), timeout=START_SECONDS)
        line.request("GET", "/api/v1/tenants/acme-staging", headers={"X-API-Key": given["KEY"]})
        answer = line.getresponse()
        assert json.loads(answer.read())["enabled"] is True
        line.close()
        playing.send_signal(number)
        _, stderr = playing.communicate(timeout=START_SECONDS)
    assert (playing.returncode, stderr) == (0, "")
    assert traces(tmp_path) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(given["SERVER"].rpartition(":")[2])), 1)


def test_the_demo_that_is_ended_while_it_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    with running("demo", environ={"TMPDIR": str(tmp_path)}) as playing:
        read_until(playing.stdout, "starting: server")
        playing.send_signal(signal.SIGINT)
        _, stderr = playing.communicate(timeout=START_SECONDS)
    assert (playing.returncode, stderr) == (Code.INTERRUPTED, "")
    assert traces(tmp_path) == []


def test_a_server_that_does_not_stop_in_time_is_killed_with_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("external_oms.cli.stage.STOP_SECONDS", 0.0)
    with Stage() as stage:
        stage.start_emulator()
        stage.start_server()
        assert stage._server is not None
        session = stage._server.pid
        wait_until(lambda: len(processes_of(session)) == 3)
    wait_until(lambda: processes_of(session) == [])


def test_who_ends_the_process_in_an_uninterrupted_block_is_heard_after_it() -> None:
    done = []
    with endable():
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            done.append("finished")
        done.append("never")
    assert done == ["finished"]


class Apart(Stage):
    """A stage whose workers share nothing: what the delivery tells one of them, the other does not hear."""

    def _environment(self, place: Path) -> dict[str, str]:
        return {**super()._environment(place), f"{ENV_PREFIX}STORE": "memory://"}


def test_the_check_fails_where_a_worker_does_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("external_oms.cli.demo.Stage", Apart)
    result = run("demo", "--check")
    assert result.exit_code == Code.FAILED
    assert "answers were old" in result.stdout


class Broken(Stage):
    """A stage whose server refuses to start."""

    def _environment(self, place: Path) -> dict[str, str]:
        return {**super()._environment(place), f"{ENV_PREFIX}TTL_SECONDS": "1"}


def test_a_server_that_does_not_start_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("external_oms.cli.demo.Stage", Broken)
    result = run("demo", "--check")
    assert result.exit_code == Code.FAILED
    assert "ttl_seconds" in one_line(result.stderr)
