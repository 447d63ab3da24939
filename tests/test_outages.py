"""Whatever the config API does, an evaluation with a value at hand does no more than ever, and waits for nothing."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from openfeature import api as openfeature
from openfeature.flag_evaluation import FlagEvaluationDetails, Reason

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.testing import ConfigAPIEmulator, Fault
from tests.support.waiting import wait_until
from tests.support.watching import watched

LONGEST_SECONDS = 0.005
"""Promised: the longest that an evaluation works, of the processor's time."""

FAULTS = {
    "500": Fault(status=500, times=None),
    "hangs": Fault(delay_seconds=600.0, times=None),
    "429": Fault(status=429, retry_after="60", times=None),
    "flips": None,
}


@contextmanager
def disturbed(provider: ExternalOMSProvider, api: ConfigAPIEmulator, fault: Fault | None) -> Iterator[None]:
    """Invalidate all the time while the API fails, or answers another value each time."""
    ended = threading.Event()

    def invalidate() -> None:
        while not ended.wait(0.02):
            if fault is None:
                api.set_enabled(None, not api.enabled())
            provider.invalidate()

    if fault is not None:
        api.fault(None, fault)
    thread = threading.Thread(target=invalidate)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        api.clear(None)


@pytest.fixture
def provider(external_oms_api: ConfigAPIEmulator) -> Iterator[ExternalOMSProvider]:
    made = ExternalOMSProvider(
        external_oms_api.settings(ttl_seconds=1.0, stale_while_revalidate_seconds=600.0, timeout_seconds=1.0)
    )
    openfeature.set_provider_and_wait(made)
    gc.collect()
    gc.freeze()  # what the other tests of this process have left is not collected in the time of an evaluation
    yield made
    gc.unfreeze()
    openfeature.shutdown()
    openfeature.clear_providers()


def evaluate(provider: ExternalOMSProvider, api: ConfigAPIEmulator, how: str, seconds: float) -> float:
    """Evaluate for so long; the longest time in seconds for which an evaluation held the processor."""
    client = openfeature.get_client()
    longest, reasons, values, reads = 0.0, set[object](), set[bool](), api.reads()

    def one() -> FlagEvaluationDetails[bool]:
        return client.get_boolean_details(FLAG_KEY, default_value=False)

    with disturbed(provider, api, FAULTS[how]):
        wait_until(lambda: api.reads() > reads)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.thread_time()
            details = one()
            longest = max(longest, time.thread_time() - began)
            assert details.error_code is None, details
            reasons.add(details.reason)
            values.add(details.value)
            _, waits = watched(one)
            assert waits == []
            time.sleep(0.001)  # other threads read and invalidate
    assert reasons >= {Reason.STALE}
    assert len(values) == (2 if how == "flips" else 1)
    return longest


@pytest.mark.parametrize("how", FAULTS)
def test_an_evaluation_with_a_value_at_hand_waits_for_nothing(
    provider: ExternalOMSProvider, external_oms_api: ConfigAPIEmulator, how: str
) -> None:
    assert evaluate(provider, external_oms_api, how, 1.0) < LONGEST_SECONDS


@pytest.mark.soak
@pytest.mark.parametrize("how", FAULTS)
def test_an_evaluation_with_a_value_at_hand_waits_for_nothing_for_a_minute(
    provider: ExternalOMSProvider, external_oms_api: ConfigAPIEmulator, how: str
) -> None:
    longest = evaluate(provider, external_oms_api, how, 60.0)
    print(f"while the API {how}: the longest evaluation held the processor for {1e3 * longest:.3f} ms")
    assert longest < LONGEST_SECONDS
