"""One real local Ray cluster for the whole tier, whose workers find vllm-nld as an installed distribution."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import STARTUP
from tests.support.clusters import Cluster, install
from tests.support.threads import one_thread as one_thread

SHIM = Path(__file__).parent / "installed_shim"


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start Ray and connect this process to it. Other processes connect with its address."""
    pytest.importorskip("ray")
    import ray

    site = tmp_path_factory.mktemp("site")
    install(site)
    pythonpath = os.pathsep.join(map(str, (site, SHIM, STARTUP)))
    with pytest.MonkeyPatch.context() as patch:
        # Ray's workers inherit the environment of the cluster.
        patch.setenv("PYTHONPATH", pythonpath)
        patch.setenv("OMP_NUM_THREADS", "1")  # several workers share few cores, and waiting threads would spin
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # else a proxy that takes 5 s to start is replaced
        patch.setenv("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")  # else load is noticed after 10 s
        patch.setenv("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")  # else 0.1: an eighth of a core
        patch.setenv("RAY_worker_niceness", "0")  # else 15: tests that run at the same time would leave it no time
        patch.setenv("RAY_prestart_worker_first_driver", "0")  # else each driver starts eight workers: 7 CPU s each
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        context = ray.init(
            num_cpus=8, num_gpus=2, include_dashboard=False, object_store_memory=1 << 27, log_to_driver=False
        )
    try:
        yield Cluster(context.address_info["address"], site, pythonpath)
    finally:
        ray.shutdown()
