"""A plugin of vLLM for the tests: their processes start with less work, and sleep while they wait for each other.

vLLM loads plugins when nearly all is imported, and before it makes an engine.
"""

from __future__ import annotations

import gc
import multiprocessing
import os

FORK = "VLLM_NLD_TESTS_FORK"
"""An environment variable: set, engine cores are forked from the process that starts them."""
BUSY_SECONDS = 0.002
PRICING_SECONDS = 0.2
"""How long an engine that starts may time forwards: it matters only for speed, and the tests start hundreds."""


def install() -> None:
    """Leave what was imported out of garbage collections, time few forwards, and shorten the loops of message queues.

    An engine that starts asks for five full collections, of half a second each. A worker looks for its next message in
    a loop, for a second after each, before it sleeps (``SpinCondition`` of vLLM's ``shm_broadcast``). So a server that
    answers a request now and then takes a whole core, of which the tests have two.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    from vllm_nld.proposer.self_speculation import SelfSpeculation

    gc.freeze()
    SelfSpeculation.pricing_seconds = PRICING_SECONDS
    shm_broadcast.SpinCondition.__init__.__defaults__ = (BUSY_SECONDS,)
    if os.environ.get(FORK):
        from vllm.v1.engine import utils

        utils.get_mp_context = lambda: multiprocessing.get_context("fork")
