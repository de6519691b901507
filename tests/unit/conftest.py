"""The unit tier computes on one core, and does not compile vLLM's functions, because compiling takes longer."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.threads import one_thread as one_thread


@pytest.fixture(autouse=True, scope="module")
def nothing_is_compiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield
