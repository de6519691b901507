"""Code that tests share: models, engines, clusters, and requirements on the machine."""

from pathlib import Path

STARTUP = Path(__file__).parent / "startup"
"""On the ``PYTHONPATH`` of every process that the tests start: what it runs first, and a plugin of vLLM."""
