"""The flag in an asyncio service (FastAPI, aiohttp, …): no evaluation holds the event loop, not even the first.

Run it by `python examples/async_service.py`.
"""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

from openfeature import api

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.testing import ConfigAPIEmulator, Fault


async def beat(beats: list[float]) -> None:
    """Whatever else the service does: it must go on while a first read is slow."""
    while True:
        beats.append(time.monotonic())
        await asyncio.sleep(0.01)


async def serve(provider: ExternalOMSProvider) -> None:
    """A hundred requests at once ask on a cold cache; the config API sees one read."""
    beats: list[float] = []
    heart = asyncio.create_task(beat(beats))
    api.set_provider(provider)  # does not wait; a service that wants to calls set_provider_and_wait in a thread
    answers = await asyncio.gather(
        *(provider.resolve_boolean_details_async(FLAG_KEY, default_value=False) for _ in range(100))
    )
    heart.cancel()
    longest = max(later - earlier for earlier, later in pairwise(beats))
    print(f"{len(answers)} answers {answers[0].value}; the loop never stood still for more than {longest * 1e3:.0f} ms")


def main() -> None:
    """Serve against an emulator that takes half a second to answer."""
    with ConfigAPIEmulator(("acme-staging",), enabled=True) as emulator:
        emulator.fault("acme-staging", Fault(delay_seconds=0.5))
        asyncio.run(serve(ExternalOMSProvider(settings=emulator.settings())))
        print("reads that the config API saw:", emulator.reads("acme-staging"))
        api.shutdown()


if __name__ == "__main__":
    main()
