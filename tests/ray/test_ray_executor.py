"""Tensor parallelism under Ray gives the tokens of one rank, with workers that load the installed plugin."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.clusters import Cluster
from tests.support.models import random_model, save, small_config

DRIVER = Path(__file__).parent / "tensor_parallel_driver.py"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "detokenize": False}
SEEDED: dict[str, Any] = GREEDY | {"temperature": 1.0, "seed": 7}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"mode": "ar"}, GREEDY),
    ({"mode": "self_speculation"}, GREEDY),
    ({"mode": "self_speculation"}, SEEDED),
    ({"mode": "auto"}, GREEDY),
    ({"mode": "diffusion", "threshold": 0.3}, GREEDY),
    ({"mode": "diffusion", "threshold": 0.3}, SEEDED),
]
DRAW = random.Random(9)
PROMPTS = [[DRAW.randrange(6, 24) for _ in range(length)] for length in (1, 2, 40, 17)]
"""Not with tests.support.engines: nothing else in this process needs vLLM, which takes ten seconds to import."""


def test_two_ray_workers_give_the_tokens_of_one_until_one_is_killed(ray_cluster: Cluster, tmp_path: Path) -> None:
    """One KV head, which both ranks hold, and a vocabulary that lies only in the first rank's shard.

    The driver starts in a folder outside this project.
    """
    folder = save(random_model(small_config(num_key_value_heads=1)), tmp_path / "model")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    environment |= {
        "RAY_ADDRESS": ray_cluster.address,
        "PYTHONPATH": ray_cluster.pythonpath,
        "OMP_NUM_THREADS": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # collective_rpc takes functions
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    results = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(results)],
        input=json.dumps({"model": str(folder), "prompts": PROMPTS, "cases": CASES}),
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:] + done.stdout[-2000:]
    found = json.loads(results.read_text())
    assert found["tokens"] == found["expected"]
    assert len({tuple(tokens) for tokens in found["tokens"]}) > len(PROMPTS)
    first, second = found["workers"]
    assert len({first["pid"], second["pid"], found["driver"]}) == 3
    assert {*first["devices"], *second["devices"]} == {"0", "1"}
    for worker in (first, second):
        assert worker["worker"] == "NLDCPUWorker"
        assert Path(worker["module"]).is_relative_to(ray_cluster.site)
        assert worker["draft_forwards"] > 0
    assert first["draft_forwards"] == second["draft_forwards"]
    assert "EngineDeadError" in found["death"]["error"], found["death"]
    assert 0 <= found["death"]["seconds"] < 100  # on a busy machine; a step may take 300
