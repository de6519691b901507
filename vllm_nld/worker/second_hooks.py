"""What both platforms' workers do besides vLLM's own work, with vLLM's second model runner."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from vllm_nld.errors import NLDError
from vllm_nld.serving.ledger import Plan, Tally
from vllm_nld.serving.metrics import Publisher, snapshot_path, tally_samples
from vllm_nld.vllm_glue.steps import note_on


class IntroducesSpeculator:
    """Mix-in: have the runner use this extension's speculator, and answer for its counts.

    The scheduler knows which tokens a step yielded; its counts come with the next step.
    """

    vllm_config: Any
    model_runner: Any
    rank: int
    use_v2_model_runner: bool
    _publisher: Publisher | None = None

    def init_device(self) -> None:
        """Initialise the device and the runner, as vLLM does, with a speculator of this extension."""
        if not self.use_v2_model_runner:
            raise NLDError(
                f"worker_cls={type(self).__name__} is for vLLM's second model runner, which this engine does not use; "
                "leave worker_cls out"
            )
        from vllm_nld.speculator.model_state import install

        install()
        self._target_forwards, self._plan = 0, Plan(Tally(), Counter(), auto_drafts=True, requests=0)
        super().init_device()  # type: ignore[misc]
        self.model_runner.speculator.attach(self.model_runner)
        if self.rank == 0:
            self._publisher = Publisher(snapshot_path(self.vllm_config))

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        """Make the KV cache, as vLLM does, and find out its layout."""
        result = super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        self.model_runner.speculator.find_layout()
        return result

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """Warm up, as vLLM does, the draft pass first."""
        self.model_runner.speculator.warm_up()
        return super().compile_or_warm_up_model(*args, **kwargs)  # type: ignore[misc]

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a causal step, as vLLM does, count it, publish the counts, and see whether auto mode drafts after it."""
        busy = scheduler_output.total_num_scheduled_tokens > 0
        self._target_forwards += busy
        note = note_on(scheduler_output)
        if isinstance(note, Plan):
            self._plan = note
            self.model_runner.speculator.auto_drafts = note.auto_drafts
        if self._publisher is not None:
            self._publisher.publish(lambda: self._samples(wait=not busy), now=not busy)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def _samples(self, wait: bool) -> Any:
        drafted = self.model_runner.speculator.all_forwards
        return tally_samples(self._whole(wait), self._target_forwards, drafted, self._plan.decisions)

    def _whole(self, wait: bool) -> Tally:
        """Return the scheduler's counts, with the speculator's of denoising and branches, which may ``wait``."""
        whole = copy.deepcopy(self._plan.tally)
        for name, counts in self.model_runner.speculator.denoised.as_dict().items():
            getattr(whole, name).update(counts)
        branching = self.model_runner.speculator.branching
        if branching is not None:
            whole.branches.update(branching.counted(wait))
            whole.forwards["draft"] -= min(branching.undrafted, whole.forwards["draft"])  # the scheduler counts all
        return whole

    def nld_counters(self) -> dict[str, int]:
        """Return counts since start-up, as on the first runner, but without the last step."""
        return {
            "target_forwards": self._target_forwards,
            "draft_forwards": self.model_runner.speculator.all_forwards,
            "cycles": self._plan.tally.blocks["self_speculation"],
        }

    def nld_tally(self) -> dict[str, dict[str, int]]:
        """Return the ledger since start-up, as on the first runner, but without the last step."""
        decisions = {f"{mode} {length}": count for (mode, length), count in self._plan.decisions.items()}
        return {**self._whole(wait=True).as_dict(), "decisions": decisions}
