"""A float8 KV cache with a scale for each head, on the second runner."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.test_float8_cache import check
from tests.support.second_runner import second_engine


def test_self_speculation_equals_ar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check("attn_head", tmp_path, monkeypatch, second_engine)
