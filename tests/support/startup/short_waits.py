"""A plugin of vLLM for the tests: its processes sleep while they wait for each other.

A worker looks for its next message in a loop, for a second after each, before it sleeps. So a server that answers a
request now and then takes a whole core, of which the tests have two.
"""

from __future__ import annotations

BUSY_SECONDS = 0.002


def install() -> None:
    """Shorten the loops of this process' message queues (``SpinCondition`` of vLLM's ``shm_broadcast``)."""
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.SpinCondition.__init__.__defaults__ = (BUSY_SECONDS,)
