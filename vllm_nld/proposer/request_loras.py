"""Requests' own LoRAs (``--enable-lora``) in a draft pass: vLLM sets them up for causal passes, by batch row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_nld.draft_pass.block import Block
from vllm_nld.vllm_glue.runner import set_active_loras


class TaskLoRAs:
    """Makes every token of a forward use the LoRA of the request that its block belongs to.

    A draft of a request with a LoRA is verified by the model with that LoRA, so it is also drafted with it, and with
    the draft adapter on top. vLLM sets its own mapping again before every causal pass.

    Args:
        runner: vLLM's model runner.
        mask_token_id: the positions whose logits are asked for.
    """

    def __init__(self, runner: Any, mask_token_id: int) -> None:
        self._runner = runner
        self._mask_token_id = mask_token_id

    def __call__(self, blocks: Sequence[Block], tokens: int, logits: int) -> None:
        """Activate the blocks' LoRAs.

        Args:
            blocks: of the forward, laid end to end.
            tokens: that the forward runs, padding at the end included.
            logits: rows of logits asked for, padding included; one per mask token.
        """
        ids = [0 if block.task is None else block.task.lora_int_id for block in blocks]
        by_token = [own for own, block in zip(ids, blocks, strict=True) for _ in block.tokens]
        by_logit = [
            own for own, block in zip(ids, blocks, strict=True) for _ in range(block.tokens.count(self._mask_token_id))
        ]
        by_token += by_token[-1:] * (tokens - len(by_token))
        by_logit += by_logit[-1:] * (logits - len(by_logit))
        set_active_loras(self._runner, by_logit, by_token, {block.task for block in blocks if block.task is not None})
