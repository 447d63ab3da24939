"""Genuine deliveries, and everything that is not one."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from external_oms.errors import SignatureError
from external_oms.signature import check_secret, matching_bearer, sign, verify

NOW = 1_780_000_000.0
BODY = b'{"tenant": "acme", "name": "changed"}'


def _secret(seed: int, size: int = 32) -> str:
    return "whsec_" + base64.b64encode(bytes((seed + n) % 256 for n in range(size))).decode()


OLD, NEW, FOREIGN = _secret(1), _secret(2), _secret(3)


def _verify(
    headers: dict[str, str], *, body: bytes = BODY, secrets: tuple[str, ...] = (OLD, NEW), now: float = NOW
) -> str:
    return verify(body, headers, secrets=secrets, tolerance_seconds=300, now_wall=now).delivery_id


def _signed(secret: str = NEW, *, delivery_id: str = "msg_1", at: float = NOW, body: bytes = BODY) -> dict[str, str]:
    return sign(body, secret=secret, delivery_id=delivery_id, at_wall=at)


@pytest.mark.parametrize("secret", [OLD, NEW])
def test_a_delivery_by_any_of_the_secrets_is_genuine(secret: str) -> None:
    assert _verify(_signed(secret)) == "msg_1"


def test_our_signature_is_the_one_of_the_library() -> None:
    theirs = Webhook(NEW).sign("msg_1", datetime.fromtimestamp(NOW, UTC), BODY.decode())
    assert _signed()["webhook-signature"] == theirs


@given(body=st.text().map(str.encode), at=st.integers(0, 10**11 - 1), number=st.integers(0, 10**9))
def test_whatever_is_signed_is_genuine_at_its_moment(body: bytes, at: int, number: int) -> None:
    headers = _signed(delivery_id=f"msg_{number}", at=at, body=body)
    assert _verify(headers, body=body, now=float(at)) == f"msg_{number}"


def test_the_names_of_the_headers_are_found_in_any_case() -> None:
    assert _verify({name.title(): value for name, value in _signed().items()}) == "msg_1"


def test_one_good_signature_among_several_is_enough() -> None:
    headers = _signed()
    headers["webhook-signature"] = f"v1a,abcd v1,é= {headers['webhook-signature']} v2,x"
    assert _verify(headers) == "msg_1"


@pytest.mark.parametrize(("off", "genuine"), [(-301, False), (-300, True), (0, True), (300, True), (301, False)])
def test_the_tolerance_holds_both_ways_to_the_second(off: int, genuine: bool) -> None:
    headers = _signed(at=NOW + off)
    if genuine:
        assert _verify(headers) == "msg_1"
    else:
        with pytest.raises(SignatureError, match="is a clock wrong"):
            _verify(headers)


def test_the_tolerance_is_what_was_set() -> None:
    headers = _signed(at=NOW - 100)
    with pytest.raises(SignatureError, match="more than 60 s"):
        verify(BODY, headers, secrets=(NEW,), tolerance_seconds=60, now_wall=NOW)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"webhook-id": None}, "webhook-id is missing"),
        ({"webhook-timestamp": None}, "webhook-timestamp is missing"),
        ({"webhook-signature": None}, "webhook-signature is missing"),
        ({"webhook-id": "msg_2"}, "no configured secret"),
        ({"webhook-id": ""}, "printable ASCII"),
        ({"webhook-id": "msg 1"}, "printable ASCII"),
        ({"webhook-id": "msg_é"}, "printable ASCII"),
        ({"webhook-id": "m" * 257}, "printable ASCII"),
        ({"webhook-timestamp": "1e9"}, "whole seconds"),
        ({"webhook-timestamp": "-1780000000"}, "whole seconds"),
        ({"webhook-timestamp": "١٧٨٠٠٠٠٠٠٠"}, "whole seconds"),
        ({"webhook-timestamp": "9" * 400}, "whole seconds"),
        (
            {"webhook-timestamp": f"0{int(NOW)}"},
            "whole seconds",
        ),  # the signature is that of the number without the zero
        ({"webhook-timestamp": str(int(NOW) + 1)}, "no configured secret"),
        ({"webhook-signature": ""}, "no configured secret"),
        ({"webhook-signature": "v1"}, "no configured secret"),
        ({"webhook-signature": "v1,é"}, "no configured secret"),
        ({"webhook-signature": "v1,\ud800"}, "no configured secret"),
        ({"webhook-signature": "v1,a " * 1000}, "longer than 4096"),
    ],
)
def test_a_header_that_is_missing_or_wrong_is_not_genuine(change: dict[str, str | None], said: str) -> None:
    headers = {name: value for name, value in (_signed() | change).items() if value is not None}
    with pytest.raises(SignatureError, match=said):
        _verify(headers)


@given(position=st.integers(0, len(BODY) - 1), bit=st.integers(0, 6))
def test_a_body_that_was_changed_by_one_bit_is_not_genuine(position: int, bit: int) -> None:
    changed = bytearray(BODY)
    changed[position] ^= 1 << bit
    with pytest.raises(SignatureError, match="no configured secret"):
        _verify(_signed(), body=bytes(changed))


@pytest.mark.parametrize("secrets", [(), (FOREIGN,), (FOREIGN, OLD)])
def test_without_the_right_secret_nothing_is_genuine(secrets: tuple[str, ...]) -> None:
    with pytest.raises(SignatureError, match="no configured secret"):
        _verify(_signed(NEW), secrets=secrets)


def test_a_body_that_is_not_utf8_is_not_genuine() -> None:
    with pytest.raises(SignatureError, match="not UTF-8"):
        _verify(_signed(), body=b"\xff")


texts = st.text(max_size=40) | st.sampled_from(["msg_1", str(int(NOW)), "v1,x", "v1a,", "v1,="])


@given(
    body=st.binary(max_size=40),
    headers=st.dictionaries(
        st.sampled_from(["webhook-id", "Webhook-Timestamp", "WEBHOOK-SIGNATURE", "host"]) | st.text(max_size=10), texts
    ),
    secrets=st.lists(st.sampled_from([OLD, "whsec_", "", "whsec_!!!", "é"]) | st.text(max_size=30), max_size=3),
)
def test_whatever_arrives_only_a_signature_error_is_raised(
    body: bytes, headers: dict[str, str], secrets: list[str]
) -> None:
    with pytest.raises(SignatureError):
        verify(body, headers, secrets=secrets, tolerance_seconds=300, now_wall=NOW)


@pytest.mark.parametrize(
    ("delivery_id", "at", "said"),
    [
        ("", NOW, "delivery id"),
        ("a b", NOW, "delivery id"),
        ("m", -1.0, "moment"),
        ("m", 1e11, "moment"),
        ("m", float("nan"), "moment"),
    ],
)
def test_what_could_not_be_verified_is_not_signed(delivery_id: str, at: float, said: str) -> None:
    with pytest.raises(SignatureError, match=said):
        _signed(delivery_id=delivery_id, at=at)


@pytest.mark.parametrize("size", [24, 25, 32, 64])
def test_a_secret_of_24_to_64_bytes_passes_padded_or_not(size: int) -> None:
    check_secret(_secret(1, size))
    check_secret(_secret(1, size).rstrip("="))


@pytest.mark.parametrize(
    "secret",
    ["", "whsec_", _secret(1, 23), _secret(1, 65), _secret(1)[6:], "whsec_" + "é" * 32, "whsec_!" + _secret(1)[7:]],
)
def test_a_malformed_secret_is_refused_and_not_repeated(secret: str) -> None:
    with pytest.raises(SignatureError) as caught:
        check_secret(secret)
    assert str(caught.value) == "must be whsec_ followed by 24 to 64 bytes in base64"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("header", "matches"),
    [
        ("Bearer k2", True),
        ("bearer k1", True),
        ("BEARER  k1 ", True),
        (None, False),
        ("", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("Bearer k3", False),
        ("Bearer k", False),
        ("Basic k1", False),
        ("k1", False),
        ("Bearer é\ud800", False),
    ],
)
def test_a_matching_bearer_one_of_the_keys_or_none(header: str | None, matches: bool) -> None:
    assert (matching_bearer(header, ["k1", "k2", ""]) > 0) is matches


@given(header=st.none() | st.text(), keys=st.lists(st.text(), max_size=3))
def test_no_bearer_raises(header: str | None, keys: list[str]) -> None:
    matching_bearer(header, keys)


def test_the_library_comes_in_with_the_first_signature_only() -> None:
    code = "import sys, external_oms.signature; assert 'standardwebhooks' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_which_secret_and_which_key_it_was_is_known() -> None:
    for number, secret in enumerate((OLD, NEW), start=1):
        found = verify(BODY, _signed(secret), secrets=(OLD, NEW), tolerance_seconds=300, now_wall=NOW)
        assert found == ("msg_1", number)
    assert [matching_bearer(f"Bearer {key}", ["k1", "k2"]) for key in ("k1", "k2", "k3")] == [1, 2, 0]


@pytest.mark.parametrize("number", range(20))
def test_the_library_of_the_standard_verifies_what_is_signed_here_and_the_other_way_round(number: int) -> None:
    """Interoperability: `standardwebhooks` is the reference of the specification's authors."""
    body, secret = (
        b'{"number": %d, "text": "\xc3\xa9"}' % number,
        f"whsec_{base64.b64encode(bytes([number]) * 32).decode()}",
    )
    library, now = Webhook(secret), int(time.time())
    headers = sign(body, secret=secret, delivery_id=f"msg_{number}", at_wall=now)
    assert library.verify(body.decode(), headers) == {"number": number, "text": "\u00e9"}
    signed = library.sign(f"msg_{number}", datetime.fromtimestamp(now, tz=UTC), body.decode())
    theirs = headers | {"webhook-signature": signed}
    assert verify(body, theirs, secrets=[secret], tolerance_seconds=300, now_wall=now).entry == 1
