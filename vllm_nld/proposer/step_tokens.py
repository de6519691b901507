"""The tokens of the step that vLLM has just run, where this extension replaces some."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_nld.origins import DENOISED
from vllm_nld.proposer.request_state import RequestState

TokenArray = np.ndarray[Any, np.dtype[Any]]


class StepTokens:
    """The step's tokens as vLLM keeps them, in three places that must agree."""

    def __init__(self, sampled: list[list[int]], decided: TokenArray, ids: TokenArray) -> None:
        self.sampled, self.decided, self.ids = sampled, decided, ids

    def history(self, row: int) -> TokenArray:
        """Return a row's decided tokens, prompt and text, this step's included."""
        return self.ids[row, : int(self.decided[row])]

    def seed(self, row: int) -> tuple[int, int]:
        """Return the token that opens a row's next block, and how many tokens come before it."""
        return self.sampled[row][-1], int(self.decided[row]) - 1

    def replace_last(self, row: int, token: int, state: RequestState) -> None:
        """Replace the last sampled token of a row; vLLM returns the very lists that it passed to ``propose``."""
        self.sampled[row][-1] = token
        self.ids[row, int(self.decided[row]) - 1] = token
        state.cached.output_token_ids[-1] = token
        if state.options.report:
            state.note_origins(DENOISED)
