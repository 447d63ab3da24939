from __future__ import annotations

import json
import logging
import random
from time import time
from typing import Any

import pytest

from external_oms import signature
from external_oms.errors import SignatureError
from external_oms.problems import PROBLEM_TYPE
from tests.support.web import BEARER, HOOK, MALFORMED, SECRET, Server, StartServer


class Mangler:
    """Makes deliveries of which each is wrong in at least one way, from a seed."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def delivery(self) -> dict[str, Any]:
        body = self.body()
        if self.dice.random() < 0.3:  # genuine, so that what lies behind the 401 is met as well
            headers: dict[str, str] = self.genuine(body)
            return {"data": body, "headers": headers, "content_type": "application/json"}
        content_type = self.dice.choice(
            ["application/json", "text/plain", "", "application/json; charset=\xe9", self.text(20)]
        )
        return {"data": body, "headers": self.headers(), "content_type": content_type}

    def genuine(self, body: bytes) -> dict[str, str]:
        try:
            return signature.sign(body, secret=SECRET, delivery_id=f"m{self.dice.random()}", at_wall=time())
        except SignatureError:  # the body is not UTF-8, which nobody can sign
            return {"Authorization": f"Bearer {BEARER}"}

    def body(self) -> bytes:
        kind = self.dice.randrange(5)
        if kind == 0:
            return self.dice.randbytes(self.dice.randrange(200))
        if kind == 1:
            return self.dice.choice(MALFORMED)
        if kind == 2:
            return b'{"tenant": ' + json.dumps(self.value()).encode() + b"}"
        if kind == 3:
            whole = b'{"tenant": "acme-staging", "name": "x", "payload": {"a": [1, 2, {"b": null}]}}'
            return whole[: self.dice.randrange(len(whole))]
        return json.dumps(self.dice.choice([None, 1, "x", [self.value()]])).encode()

    def value(self) -> object:
        return self.dice.choice(
            [None, 1, -1.5, True, [], {}, "", " acme-staging", "ACME", "../acme", "nobody", self.text(30)]
        )

    def headers(self) -> dict[str, str]:
        named = ["webhook-id", "webhook-timestamp", "webhook-signature", "Authorization", "X-API-Key", "Cookie"]
        made = {name: self.text(60) for name in named if self.dice.random() < 0.4}
        if self.dice.random() < 0.3:
            made["webhook-timestamp"] = self.dice.choice(
                [str(int(time())), "9" * 40, "-1", "0x10", "1e9", "\u0661" * 9, "NaN"]
            )
        if self.dice.random() < 0.3:
            made["Authorization"] = self.dice.choice(
                ["Bearer", "Bearer ", "Basic x", f"bearer{BEARER}", f"Bearer {BEARER}x"]
            )
        return {name: value.encode("latin-1", "replace").decode("latin-1") for name, value in made.items()}

    def text(self, longest: int) -> str:
        letters = "ab19,.=+/ v1:;\"'{}[]\\%\x7f\xe9\xff\t"
        return "".join(self.dice.choices(letters, k=self.dice.randrange(longest)))


def fuzz(server: Server, caplog: pytest.LogCaptureFixture, *, number: int) -> dict[int, int]:
    caplog.set_level(logging.DEBUG)
    mangler = Mangler(seed=20261123)
    statuses: dict[int, int] = {}
    for _ in range(number):
        answer = server.client.post(HOOK, **mangler.delivery())
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.mimetype == PROBLEM_TYPE
    assert all(400 <= status < 500 for status in statuses), statuses
    assert server.generation() == 0
    said = [record.getMessage() for record in caplog.records]
    secrets = [SECRET, SECRET.removeprefix("whsec_"), BEARER, *server.oms.settings.api_keys]
    assert not [line for line in said if any(secret in line for secret in secrets)]
    lines = [record for record in caplog.records if record.name == "external_oms.webhook"]
    assert len(lines) == 1, "one line a minute"
    server.oms.webhook.refusals.flush()
    assert f"refused deliveries in the last minute: {number - 1} (" in caplog.records[-1].getMessage()
    assert not [line for line in said if not line.isprintable()]
    return statuses


@pytest.mark.timeout(180)  # 2 s on an idle machine; coverage and busy cores multiply it
def test_thousands_of_malformed_deliveries_are_refused_and_change_nothing(
    start: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    statuses = fuzz(start(webhook_per_minute=1_000_000), caplog, number=3_000)
    assert {400, 401, 404} <= set(statuses)
