"""What both platforms' workers do besides vLLM's own work; the classes are in ``cpu.py`` and ``gpu.py``.

One module per platform: vLLM's CPU worker replaces parts of torch as soon as it is imported, which would break a GPU.
"""

from __future__ import annotations

from typing import Any

from vllm_nld.draft_pass.warm_up import compilations_allowed, warm_up
from vllm_nld.serving.metrics import Publisher, snapshot_path, worker_samples
from vllm_nld.vllm_glue.padding import grammar_without_padding, without_padding
from vllm_nld.vllm_glue.runner import attach_proposer
from vllm_nld.vllm_glue.steps import with_note


class IntroducesProposer:
    """Mix-in: after the runner exists, hand it to its proposer."""

    vllm_config: Any
    model_runner: Any
    rank: int
    _target_forwards = 0
    _publisher: Publisher | None = None
    _planned: Any = None
    """The last step as the scheduler made it, perhaps padded."""

    def init_device(self) -> None:
        """Initialise the device and the runner, as vLLM does, then attach the proposer."""
        super().init_device()  # type: ignore[misc]
        if self.rank == 0:
            self._publisher = Publisher(snapshot_path(self.vllm_config))
        attach_proposer(self.model_runner, self.vllm_config.speculative_config.num_speculative_tokens)

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        """Make the KV cache, as vLLM does, and find out its layout."""
        result = super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        self.model_runner.drafter.draft_pass.find_layout()
        return result

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """Warm up, as vLLM does, our operators first; then learn what forwards cost here, for auto mode."""
        drafter = self.model_runner.drafter
        warm_up(drafter.draft_pass, drafter.block_length)
        result = super().compile_or_warm_up_model(*args, **kwargs)  # type: ignore[misc]
        with compilations_allowed():
            drafter.measure_costs()
        return result

    def update_max_model_len(self, max_model_len: int) -> None:
        """Lower the limit to what the cache holds (``--max-model-len auto``), and tell the proposer."""
        super().update_max_model_len(max_model_len)  # type: ignore[misc]
        attach_proposer(self.model_runner, self.vllm_config.speculative_config.num_speculative_tokens)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a causal step, as vLLM does, count it, and publish the counts. A step without tokens denoises."""
        self._planned = scheduler_output
        scheduler_output = without_padding(scheduler_output)
        busy = scheduler_output.total_num_scheduled_tokens > 0
        self._target_forwards += busy
        drafter = self.model_runner.drafter
        drafter.begin_step(scheduler_output)
        if self._publisher is not None:
            # vLLM reports the last finished request in an empty step, and no step follows while the engine is idle.
            idle = not busy and not drafter.parked
            self._publisher.publish(lambda: worker_samples(drafter, self._target_forwards), now=idle)
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        if not busy:
            drafter.denoise_parked()
        return self._noted(output)

    def sample_tokens(self, grammar_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Decide the step's tokens and draft, as vLLM does, and tell the scheduler of blocks that are not done."""
        grammar_output = grammar_without_padding(grammar_output, self._planned)
        return self._noted(super().sample_tokens(grammar_output, *args, **kwargs))  # type: ignore[misc]

    def _noted(self, output: Any) -> Any:
        """Let a step's result carry what the scheduler must know; None is the first half of a step, not a result."""
        note = self.model_runner.drafter.take_note() if output is not None else None
        return output if note is None else with_note(output, note)

    def nld_counters(self) -> dict[str, int]:
        """Return counts since start-up, for ``LLM.collective_rpc("nld_counters")``.

        ``target_forwards`` are causal steps (prefill chunks, verifies, plain steps), ``draft_forwards`` draft passes,
        ``cycles`` verified blocks, one per request and step.
        """
        drafter = self.model_runner.drafter
        return {
            "target_forwards": self._target_forwards,
            "draft_forwards": drafter.draft_pass.forwards,
            "cycles": drafter.ledger.total.blocks["self_speculation"],
        }

    def nld_tally(self) -> dict[str, dict[str, int]]:
        """Return the ledger since start-up: ``forwards`` by kind, ``tokens``, ``blocks`` and ``accepted`` by mode.

        Also ``decisions`` of auto mode, keyed ``"mode block_length"``, one per request and step.
        """
        drafter = self.model_runner.drafter
        decisions = {f"{mode} {length}": count for (mode, length), count in drafter.auto.decisions.items()}
        return {**drafter.ledger.total.as_dict(), "decisions": decisions}
