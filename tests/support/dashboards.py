"""A real Prometheus that scrapes a server."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from grafana.panels import Prometheus


def missing() -> str | None:
    """Return what a test with Prometheus lacks on this machine, or None."""
    return None if shutil.which("prometheus") else "no prometheus (apt-get install prometheus)"


@contextlib.contextmanager
def scraping(target: str, port: int, folder: Path) -> Iterator[Prometheus]:
    """Yield a Prometheus that scrapes ``target``, as ``host:port``, every second."""
    configuration = folder / "prometheus.yml"
    configuration.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: vllm, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    command = ["prometheus", f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        found = Prometheus(f"http://127.0.0.1:{port}")
        for _ in range(600):
            if found.scrapes():
                break
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        process.wait(30)
