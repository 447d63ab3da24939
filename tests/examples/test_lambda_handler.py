"""lambda_handler.py, called as Lambda calls it, in this process."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openfeature import api as openfeature

from external_oms.emulator import ConfigAPIEmulator
from external_oms.testing import sign_delivery
from external_oms.webhook import PATH
from tests.support.servers import environment
from tests.support.web import SECRET, TENANT

EXAMPLE = Path(__file__).parents[2] / "examples" / "lambda_handler.py"

Handler = Callable[[dict[str, Any], object], dict[str, Any]]


@pytest.fixture
def api() -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator([TENANT]) as emulator:
        yield emulator


@pytest.fixture
def handler(api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Handler]:
    for name, value in environment(api, store="memory://").items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("lambda_handler", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.handler
    openfeature.shutdown()


def owner(handler: Handler) -> str:
    answer = handler({"rawPath": "/orders", "headers": {}, "body": "{}"}, None)
    assert answer["statusCode"] == 201
    return str(json.loads(answer["body"])["owner"])


@pytest.mark.parametrize("encoded", [False, True])
def test_a_delivery_changes_what_the_next_invocation_answers(
    handler: Handler, api: ConfigAPIEmulator, encoded: bool
) -> None:
    assert owner(handler) == "ours"
    api.set_enabled(TENANT, True)
    body = json.dumps({"tenant": TENANT}).encode()
    text = base64.b64encode(body).decode() if encoded else body.decode()
    event = {"rawPath": PATH, "headers": sign_delivery(body, SECRET), "body": text, "isBase64Encoded": encoded}
    assert handler(event, None)["statusCode"] == 200
    assert owner(handler) == "external"
    assert handler({**event, "headers": {}}, None)["statusCode"] == 401
