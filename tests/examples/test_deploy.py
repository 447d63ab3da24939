"""The files of examples/deploy are well formed, and name only settings, options, routes and files that exist."""

from __future__ import annotations

import configparser
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from gunicorn.config import KNOWN_SETTINGS

from external_oms.emulator import ConfigAPIEmulator
from external_oms.settings import ENV_PREFIX, Settings
from external_oms.web import create_app
from tests.support.servers import environment

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
ROOT = DEPLOY.parents[1]
FILES = [path for path in sorted(DEPLOY.rglob("*")) if path.is_file() and path.suffix not in {".py", ".pyc"}]


def read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


@cache
def parsed(name: str) -> Any:  # noqa: ANN401 - any YAML
    return yaml.safe_load(read(name))


@cache
def container() -> dict[str, Any]:
    (found,) = parsed("kubernetes/deployment.yaml")["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


@cache
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # the documented way to keep the case
    parser.read_string(read("external-oms.service"))
    return parser


@pytest.fixture(scope="module")
def routes() -> Iterator[set[str]]:
    """Every path of the server."""
    with ConfigAPIEmulator() as api:
        app = create_app(api.settings(insecure=True))
        yield {rule.rule for rule in app.url_map.iter_rules()}
        app.extensions["external_oms"].provider.shutdown()


@cache
def options_of_serve() -> frozenset[str]:
    command = [sys.executable, "-m", "external_oms", "serve", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return frozenset(re.findall(r"--[a-z-]+", told))


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_variable_of_ours_is_a_setting(path: Path) -> None:
    named = set(re.findall(rf"\b{ENV_PREFIX}([A-Z_]+)\b", path.read_text(encoding="utf-8")))
    injected = {"PORT"} if path.name == "deployment.yaml" else set()  # by Kubernetes; a comment tells of it
    assert {name.lower() for name in named - injected} <= set(Settings.model_fields)


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes/deployment.yaml", "external-oms.service"])
def test_the_values_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str]
    if name == "compose.yaml":
        given = parsed(name)["services"]["external-oms"]["environment"]
    elif name == "external-oms.service":
        given = dict([unit()["Service"]["Environment"].split("=", 1)])
    else:
        secret = parsed("kubernetes/secret.yaml")["stringData"]
        given = {entry["name"]: entry["value"] for entry in container()["env"]} | secret
    for line in read("external-oms.env.example").splitlines():
        if not line.startswith("#"):
            monkeypatch.setenv(*line.split("=", 1))
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("EXTERNAL_OMS_CLIENT_ID", "id")
    monkeypatch.setenv("EXTERNAL_OMS_CLIENT_SECRET", "secret")
    settings = Settings()
    assert settings.store.startswith(("redis://redis:", "rediss://", "sqlite:////var/lib/"))


def test_everything_that_has_no_default_is_asked_for() -> None:
    lines = [line for line in read("external-oms.env.example").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(rf"{ENV_PREFIX}\w+=(acme-staging)?", line) for line in lines)
    asked = {line.partition("=")[0] for line in lines}
    secret = set(parsed("kubernetes/secret.yaml")["stringData"]) - {"EXTERNAL_OMS_STORE"}
    assert asked == secret | {entry["name"] for entry in container()["env"]} - {"EXTERNAL_OMS_PROXIES"}


# -- commands ----------------------------------------------------------------------------------------------------------


def serve_commands() -> Iterator[list[str]]:
    (entry,) = re.findall(r"^ENTRYPOINT \[(.*)\]$", read("Dockerfile"), re.MULTILINE)
    (cmd,) = re.findall(r"^CMD \[(.*)\]$", read("Dockerfile"), re.MULTILINE)
    assert entry == '"external-oms"'
    yield [part.strip('" ') for part in cmd.split(",")]
    yield container()["args"]
    program, *arguments = shlex.split(unit()["Service"]["ExecStart"])
    assert Path(program).name == "external-oms"
    yield arguments


def test_the_server_is_started_with_options_that_it_has() -> None:
    for command, *arguments in serve_commands():
        assert command == "serve"
        assert {one for one in arguments if one.startswith("--")} <= options_of_serve()


def test_a_container_listens_on_the_port_that_is_published_probed_and_scraped() -> None:
    dockerfile, compose = read("Dockerfile"), parsed("compose.yaml")["services"]
    assert "EXPOSE 8080" in dockerfile
    for command in list(serve_commands())[:2]:
        assert command[command.index("--bind") + 1] == "0.0.0.0:8080"
    assert compose["external-oms"]["ports"] == ["127.0.0.1:8080:8080"]
    assert container()["ports"] == [{"name": "http", "containerPort": 8080}]
    (scraped,) = parsed("prometheus.yml")["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": ["external-oms:8080"]}]


# -- routes ------------------------------------------------------------------------------------------------------------


def test_probes_and_scrapes_ask_for_routes_that_exist(routes: set[str]) -> None:
    probed = {container()[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert probed == {"/healthz", "/readyz"}
    assert container()["livenessProbe"]["httpGet"]["path"] == "/healthz"
    asked = {*re.findall(r"http://127.0.0.1:8080(/\w+)", read("Dockerfile"))}
    asked |= {one["metrics_path"] for one in parsed("prometheus.yml")["scrape_configs"]}
    assert probed | asked <= routes


def test_nginx_knows_the_event_streams_and_the_header_of_every_proxy(routes: set[str]) -> None:
    text = read("nginx.conf")
    statements = [line.split("#")[0].strip() for line in text.splitlines()]
    assert all(not line or line[-1] in "{};" for line in statements)
    assert text.count("{") == text.count("}")
    (streams,) = re.findall(r"location ~ (\S+)", text)
    assert {route for route in routes if re.search(streams, route)} == {"/ofrep/v1/events", "/api/v1/events"}
    assert set(re.findall(r"location = (\S+)", text)) <= routes
    headers = set(re.findall(r"proxy_set_header X-Forwarded-(\w+)", text))
    assert headers == {"For", "Proto", "Host", "Prefix"}
    assert "client_max_body_size 64k;" in text
    assert Settings.model_fields["webhook_max_bytes"].default == 64 * 1024


# -- files -------------------------------------------------------------------------------------------------------------


def test_what_a_file_names_in_the_repository_is_there() -> None:
    services = parsed("compose.yaml")["services"]
    mounts = [volume for service in services.values() for volume in service.get("volumes", ()) if volume[0] == "."]
    assert mounts
    for mount in mounts:
        assert (DEPLOY / mount.split(":")[0]).is_file(), mount
    build = services["external-oms"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", read("Dockerfile"), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
    kustomization = parsed("kubernetes/kustomization.yaml")["resources"]
    assert {*kustomization, "kustomization.yaml"} == {path.name for path in (DEPLOY / "kubernetes").iterdir()}


def test_the_manifests_belong_together() -> None:
    deployment, service, secret = (parsed(f"kubernetes/{name}.yaml") for name in ("deployment", "service", "secret"))
    pod = deployment["spec"]["template"]
    assert (deployment["kind"], service["kind"], secret["kind"]) == ("Deployment", "Service", "Secret")
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert pod["spec"]["enableServiceLinks"] is False
    assert container()["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
    assert service["spec"]["ports"][0]["targetPort"] == container()["ports"][0]["name"]
    assert f"USER {pod['spec']['securityContext']['runAsUser']}" in read("Dockerfile")
    assert {one["name"] for one in container()["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}


# -- gunicorn and systemd ----------------------------------------------------------------------------------------------


def test_gunicorn_takes_its_configuration() -> None:
    known = {setting.name for setting in KNOWN_SETTINGS}
    given = {name for name in runpy.run_path(str(DEPLOY / "gunicorn.conf.py")) if name.islower() and name[0] != "_"}
    assert given - {"annotations", "multiprocessing"} <= known
    options = ["--config", str(DEPLOY / "gunicorn.conf.py"), "--chdir", str(DEPLOY.parent)]
    with ConfigAPIEmulator() as api:
        done = subprocess.run(
            [sys.executable, "-m", "gunicorn", "--check-config", *options, "flask_app:create_app()"],
            env=environment(api, store="memory://"),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr


def test_the_unit_keeps_its_state_where_it_may_write_and_systemd_takes_it(tmp_path: Path) -> None:
    service = unit()["Service"]
    assert f"sqlite:////var/lib/{service['StateDirectory']}/" in service["Environment"]
    assert set(unit().sections()) == {"Unit", "Service", "Install"}
    program = shutil.which("systemd-analyze")
    if program is None:
        return  # a machine without systemd, such as a container
    copy = tmp_path / "external-oms.service"
    text = read("external-oms.service").replace(service["ExecStart"].split()[0], "/bin/true")
    copy.write_text(text, encoding="utf-8")
    verify = [program, "verify", "--man=no", str(copy)]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60, check=False)
    assert copy.name not in done.stderr, done.stderr
