"""One local Ray cluster for the whole tier: starting one takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Start a cluster of four logical CPUs, whatever the machine has; yield its address."""
    pytest.importorskip("ray.util")  # "ray" alone would be this very folder
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    context = ray.init(num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield context.address_info["address"]
    ray.shutdown()
