"""An evaluation becomes the SDK's details: every reason, every policy, details that nobody can spoil for others."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openfeature.exception import FlagNotFoundError, GeneralError, TypeMismatchError
from openfeature.flag_evaluation import FlagResolutionDetails, Reason

from external_oms.config import FLAG_KEY
from external_oms.entry import Entry, Snapshot
from external_oms.errors import NothingToServe, Unavailable
from external_oms.policy import Evaluation, Freshness, Source
from external_oms.resolution import (
    SharedDetails,
    WhenExpired,
    details_of,
    expired_details,
    metadata_of,
    refuse_key,
    refuse_type,
)

TENANT = "acme"
FETCHED_AT = datetime(2026, 3, 1, 12, 30, 15, 250_000, tzinfo=UTC)
UPDATED_AT = datetime(2026, 2, 1, tzinfo=UTC)
POLICIES: tuple[WhenExpired, ...] = get_args(WhenExpired)


def evaluation(
    freshness: Freshness,
    source: Source = Source.MEMORY,
    *,
    enabled: bool | None = True,
    updated_at: datetime | None = None,
    generation: int = 3,
) -> Evaluation:
    known = None if enabled is None else Snapshot(enabled, updated_at, None, generation, 1, 1000.0, FETCHED_AT, 30.0)
    return Evaluation(TENANT, Entry(generation=4, token=1, snapshot=known), freshness, 1030.0, source)


FAILURE = NothingToServe(TENANT, Unavailable("no answer in time"))

# freshness, source -> reason; and with each policy when expired: value and reason, or None for an error
RESOLVED = [
    (Freshness.FRESH, Source.API, Reason.STATIC),
    (Freshness.FRESH, Source.MEMORY, Reason.CACHED),
    (Freshness.FRESH, Source.STORE, Reason.CACHED),
    (Freshness.STALE, Source.API, Reason.STALE),
    (Freshness.STALE, Source.MEMORY, Reason.STALE),
    (Freshness.STALE, Source.STORE, Reason.STALE),
]
EXPIRED: list[tuple[WhenExpired, bool | None, tuple[bool, Reason, str] | None]] = [
    ("default", None, None),
    ("default", True, None),
    ("on", None, (True, Reason.DEFAULT, "on")),
    ("on", False, (True, Reason.DEFAULT, "on")),
    ("off", None, (False, Reason.DEFAULT, "off")),
    ("off", True, (False, Reason.DEFAULT, "off")),
    ("last", None, None),
    ("last", True, (True, Reason.STALE, "on")),
    ("last", False, (False, Reason.STALE, "off")),
]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(("freshness", "source", "reason"), RESOLVED)
def test_the_table_of_reasons(freshness: Freshness, source: Source, reason: Reason, enabled: bool) -> None:
    details = details_of(evaluation(freshness, source, enabled=enabled))
    assert details is not None
    assert (details.value, details.reason, details.variant) == (enabled, reason, "on" if enabled else "off")
    assert (details.error_code, details.error_message) == (None, None)
    assert details.flag_metadata["stale"] is (freshness is Freshness.STALE)


@pytest.mark.parametrize("enabled", [True, False, None])
@pytest.mark.parametrize("source", Source)
def test_what_may_not_be_served_has_no_details(source: Source, enabled: bool | None) -> None:
    assert details_of(evaluation(Freshness.EXPIRED, source, enabled=enabled)) is None


@pytest.mark.parametrize(("policy", "enabled", "served"), EXPIRED)
def test_the_table_of_policies(
    policy: WhenExpired, enabled: bool | None, served: tuple[bool, Reason, str] | None
) -> None:
    expired = evaluation(Freshness.EXPIRED, enabled=enabled)
    if served is None:
        with pytest.raises(GeneralError, match="no answer in time") as raised:
            expired_details(expired, policy, FAILURE)
        assert raised.value.__cause__ is FAILURE
        return
    details = expired_details(expired, policy, FAILURE)
    assert (details.value, details.reason, details.variant) == served
    assert details.flag_metadata["when_expired"] == policy
    assert details.flag_metadata["stale"] is True


def test_the_table_of_policies_is_whole() -> None:
    assert {(policy, enabled is None) for policy, enabled, _ in EXPIRED} == {
        (policy, absent) for policy in POLICIES for absent in (True, False)
    }


def test_the_metadata_says_whose_how_old_from_where_and_since_when() -> None:
    assert metadata_of(evaluation(Freshness.FRESH, Source.STORE, updated_at=UPDATED_AT)) == {
        "tenant": TENANT,
        "generation": 3,
        "source": "store",
        "stale": False,
        "fetched_at": "2026-03-01T12:30:15.250Z",
        "updated_at": "2026-02-01T00:00:00.000Z",
    }


def test_the_metadata_leaves_out_what_is_not_known() -> None:
    assert "updated_at" not in metadata_of(evaluation(Freshness.FRESH))
    assert metadata_of(evaluation(Freshness.EXPIRED, enabled=None)) == {
        "tenant": TENANT,
        "generation": 4,
        "source": "memory",
        "stale": True,
    }


def test_a_value_in_the_metadata_is_of_the_kinds_that_openfeature_allows() -> None:
    for value in metadata_of(evaluation(Freshness.FRESH, updated_at=UPDATED_AT)).values():
        assert type(value) in {bool, int, float, str}, "a subclass of str, such as an enum, would surprise a pickle"


# -- shared by many, spoiled by none ------------------------------------------------------------------------------


def shared() -> SharedDetails:
    details = details_of(evaluation(Freshness.FRESH, updated_at=UPDATED_AT))
    assert details is not None
    return details


ROUND_TRIPS: dict[str, Callable[[SharedDetails], Any]] = {
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda details: pickle.loads(pickle.dumps(details)),  # noqa: S301 - our own bytes
    "dataclasses.replace": dataclasses.replace,
}


@pytest.mark.parametrize("way", ROUND_TRIPS)
def test_details_survive(way: str) -> None:
    details = shared()
    again = ROUND_TRIPS[way](details)
    assert again == details
    assert again.flag_metadata == details.flag_metadata
    again.flag_metadata["tenant"] = "evil"
    assert details.flag_metadata["tenant"] == TENANT


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_details_survive_every_protocol_of_pickle(protocol: int) -> None:
    assert pickle.loads(pickle.dumps(shared(), protocol)) == shared()  # noqa: S301 - our own bytes


def test_details_become_a_dictionary_and_json() -> None:
    as_dict = dataclasses.asdict(shared())
    assert as_dict == {
        "value": True,
        "error_code": None,
        "error_message": None,
        "reason": "CACHED",
        "variant": "on",
        "flag_metadata": shared().flag_metadata,
    }
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert json.loads(json.dumps(shared().flag_metadata)) == shared().flag_metadata


@given(st.sampled_from(sorted(shared().flag_metadata)), st.none() | st.text() | st.integers())
def test_changing_the_metadata_changes_nothing_for_others(name: str, value: object) -> None:
    details, untouched = shared(), dict(shared().flag_metadata)
    mine: Any = details.flag_metadata
    mine[name] = value
    mine.update(other=1)
    mine.clear()
    assert details.flag_metadata == untouched


@pytest.mark.parametrize("name", ["value", "reason", "variant", "error_code", "flag_metadata", "anything"])
def test_no_field_can_be_assigned(name: str) -> None:
    details = shared()
    with pytest.raises(AttributeError, match="replace"):
        setattr(details, name, False)
    assert details == shared()


def test_replaced_details_have_the_change_and_the_shared_ones_do_not() -> None:
    details: Any = shared()  # the stubs take `replace` for one that keeps the value's type variable
    changed = dataclasses.replace(details, value=False, variant="off", flag_metadata={"mine": 1})
    assert (changed.value, changed.variant, changed.flag_metadata) == (False, "off", {"mine": 1})
    assert details == shared()


def test_details_compare_by_value_also_with_the_class_of_the_sdk() -> None:
    details = shared()
    plain: FlagResolutionDetails[bool] = FlagResolutionDetails(
        True, reason=Reason.CACHED, variant="on", flag_metadata=details.flag_metadata
    )
    assert details == plain
    assert details != FlagResolutionDetails(False, reason=Reason.CACHED, variant="on")
    assert details != "on"
    with pytest.raises(TypeError):
        hash(details)


def test_details_are_made_without_metadata_too_and_keep_none_of_the_callers_dictionary() -> None:
    assert SharedDetails(True).flag_metadata == {}
    mine: dict[str, Any] = {"tenant": TENANT}
    details = SharedDetails(True, flag_metadata=mine)
    mine["tenant"] = "evil"
    assert details.flag_metadata == {"tenant": TENANT}


def test_details_become_evaluation_details_of_the_sdk() -> None:
    details = shared()
    evaluated = details.to_flag_evaluation_details(FLAG_KEY)
    assert (evaluated.value, evaluated.reason, evaluated.variant) == (True, Reason.CACHED, "on")
    details.raise_for_error()


def test_details_show_what_they_hold() -> None:
    assert "CACHED" in repr(shared())
    assert TENANT in repr(shared())


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "external_oms", "EXTERNAL_OMS_ENABLED", "external_oms_enabled ", "x" * 10_000])
def test_another_key_is_not_found_and_its_text_is_cut_short(key: str) -> None:
    with pytest.raises(FlagNotFoundError) as raised:
        refuse_key(key)
    assert len(str(raised.value)) < 200
    with pytest.raises(FlagNotFoundError):
        refuse_type(key, "a string")


def test_our_key_passes_and_as_another_type_mismatches() -> None:
    refuse_key(FLAG_KEY)
    with pytest.raises(TypeMismatchError, match="an integer"):
        refuse_type(FLAG_KEY, "an integer")
