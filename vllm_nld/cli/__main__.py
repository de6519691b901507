"""``python -m vllm_nld.cli`` is ``vllm-nld``."""

from vllm_nld.cli import app

app()
