from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_oms.errors import SettingsError
from external_oms.web.keys import APIKeys, Identity, Role, Via, new_key
from tests.support.web import ENTRIES, KEYS


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", fullmatch=True), st.sampled_from(Role))
def test_a_new_key_is_recognised_by_its_entry_which_does_not_hold_it(name: str, role: Role) -> None:
    key, entry = new_key(name, role)
    assert key.startswith("oms_")
    assert key not in entry
    assert entry == f"{name}:{role.word}:{hashlib.sha256(key.encode()).hexdigest()}"
    known = APIKeys([*ENTRIES, entry]).identity(key)
    assert known == Identity(name, role, Via.KEY, known.fingerprint if known else "")
    assert known is not None
    assert known.fingerprint not in {"", key, entry}
    assert APIKeys(ENTRIES).identity(key) is None


def test_keys_differ() -> None:
    assert len({new_key("same", Role.VIEWER)[0] for _ in range(100)}) == 100


@pytest.mark.parametrize("name", ["", ":", "a:b", " a", "-a", "a" * 65, "caf\u00e9", "a\n"])
def test_a_key_needs_a_plain_name(name: str) -> None:
    with pytest.raises(ValueError, match="a key's name is"):
        new_key(name, Role.VIEWER)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "oms_a-key-itself",
        "a:viewer",
        f"a:root:{'0' * 64}",
        f"a:viewer:{'0' * 63}",
        f":viewer:{'0' * 64}",
        "a:viewer:x:y",
    ],
)
def test_a_malformed_entry_is_refused_and_not_quoted(entry: str) -> None:
    with pytest.raises(SettingsError, match=r"^api_keys: entry 4") as refused:
        APIKeys([*ENTRIES, entry])
    assert not entry or entry not in str(refused.value)


def test_one_key_may_be_listed_among_many_and_each_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison goes on after a match: neither the place of an entry nor a match shows in its number."""
    compared: list[bytes] = []
    original = hmac.compare_digest

    def counted(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    ring = APIKeys(ENTRIES)
    for key in (*KEYS.values(), "oms_wrong"):
        compared.clear()
        ring.identity(key)
        assert len(compared) == len(ENTRIES)


def test_a_name_stands_for_one_key() -> None:
    entries = [new_key("ann", Role.VIEWER)[1], new_key("ann", Role.VIEWER)[1]]
    with pytest.raises(SettingsError, match=r"^api_keys: entry 2 has the name of another entry"):
        APIKeys(entries)
