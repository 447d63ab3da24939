"""The error tree: drawn right, and whole."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

from external_oms import errors
from external_oms.errors import (
    READ_ERRORS,
    ExternalOMSError,
    NothingToServe,
    ReadError,
    SettingsError,
    TenantError,
    Unavailable,
    WriteOutcomeUnknown,
)

_LINE = re.compile(r"^ {4}(?P<indent>[│ ]*)(?:[├└]── )?(?P<name>\w+)")


def _drawn() -> dict[str, str | None]:
    """Each class in the docstring's drawing, with the class that it hangs from."""
    parents: dict[str, str | None] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if (found := _LINE.match(line)) is None:
            continue
        depth = 0 if "──" not in line else len(found["indent"]) // 4 + 1
        above = [*above[:depth], found["name"]]
        parents[found["name"]] = above[-2] if depth else None
    return parents


def _defined(root: type[Exception]) -> dict[str, str | None]:
    tree: dict[str, str | None] = {}
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            tree |= {child.__name__: root.__name__} | _defined(child)
    return tree


def test_the_drawing_in_the_docstring_is_the_tree_of_the_classes() -> None:
    assert _drawn() == {"ExternalOMSError": None} | _defined(ExternalOMSError)


def test_every_error_is_exported() -> None:
    assert {*_drawn(), "READ_ERRORS"} == set(errors.__all__)


def test_every_read_error_is_found_by_its_word_and_no_two_share_one() -> None:
    assert set(READ_ERRORS.values()) == {ReadError, *ReadError.__subclasses__()}
    assert all(error.kind == word for word, error in READ_ERRORS.items())


def test_a_read_error_carries_its_status_and_wait_also_as_a_copy() -> None:
    error = copy.copy(Unavailable("no", status=503, retry_after_seconds=2.5))
    assert (str(error), error.status, error.retry_after_seconds) == ("no", 503, 2.5)


def test_a_settings_error_names_its_setting_first() -> None:
    error = SettingsError("ttl_seconds", "too short")
    assert (str(error), error.setting) == ("ttl_seconds: too short", "ttl_seconds")


def test_a_tenant_error_carries_the_tenant_that_was_named() -> None:
    assert TenantError("acme", "unknown").tenant == "acme"


def test_a_write_error_carries_its_status() -> None:
    assert WriteOutcomeUnknown("sent", status=502).status == 502


@pytest.mark.parametrize(
    ("failure", "because"),
    [(None, "the first read has not ended"), (Unavailable("the API is down"), "the API is down")],
)
def test_nothing_to_serve_says_why(failure: ReadError | None, because: str) -> None:
    error = NothingToServe("acme", failure)
    assert because in str(error)
    assert (error.tenant, error.failure) == ("acme", failure)


@pytest.mark.parametrize(
    "error",
    [
        SettingsError("ttl_seconds", "too short"),
        TenantError("acme", "unknown"),
        NothingToServe("acme", Unavailable("the API is down", status=503, retry_after_seconds=2.5)),
        WriteOutcomeUnknown("sent", status=502),
        Unavailable("no", status=503, retry_after_seconds=2.5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_reaches_another_process_as_it_is(error: ExternalOMSError) -> None:
    """A pool of processes waits for ever for an exception that cannot be loaded."""
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301 - our own
        assert (type(again), str(again), repr(again)) == (type(error), str(error), repr(error))
        assert {name: str(value) for name, value in vars(again).items()} == {
            name: str(value) for name, value in vars(error).items()
        }
