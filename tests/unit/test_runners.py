"""Which of vLLM's model runners an engine takes, why, and what requests may ask for there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.models import random_model, save, small_config
from vllm_nld.errors import NLDError
from vllm_nld.model import runners
from vllm_nld.names import ASYNC_SCHEDULER, SCHEDULER, SECOND_SCHEDULER
from vllm_nld.options import NLDOptions
from vllm_nld.plugin import register
from vllm_nld.serving.admission import EngineTraits, request_options
from vllm_nld.vllm_glue import second_runner

SECOND = EngineTraits(NLDOptions(), 8, second=True)


def config(folder: Path, **settings: Any) -> Any:
    """The config of an engine with self-speculation, as vLLM makes it from a user's arguments."""
    from vllm import EngineArgs

    register()
    own = {"speculative_config": {"model": "vllm_nld.SelfSpeculation"}, "dtype": "float32", "max_model_len": 128}
    return EngineArgs(model=str(folder), skip_tokenizer_init=True, **(own | settings)).create_engine_config()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(small_config()), tmp_path_factory.mktemp("runners"))


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform where vLLM takes its second runner, and schedules asynchronously."""
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setattr(second_runner, "has_triton", lambda: True)
    monkeypatch.setattr(second_runner, "asynchronous_is_possible", lambda _: True)


def test_a_cpu_takes_the_first(folder: Path) -> None:
    found = config(folder)
    assert not found.use_v2_model_runner
    assert found.scheduler_config.scheduler_cls == SCHEDULER
    assert found.parallel_config.worker_cls == "vllm_nld.worker.NLDCPUWorker"
    assert second_runner.describe(found, []).startswith("V1 (V2 wants Triton")


def test_where_vllm_takes_the_second_so_does_self_speculation(folder: Path, like_cuda: None) -> None:
    found = config(folder)
    assert found.use_v2_model_runner and found.scheduler_config.async_scheduling
    assert found.scheduler_config.scheduler_cls == ASYNC_SCHEDULER
    assert found.parallel_config.worker_cls == "vllm_nld.worker.NLDSecondCPUWorker"
    assert second_runner.describe(found, []) == "V2 (vLLM's choice), asynchronous scheduling"


def test_a_user_may_want_it_synchronous(folder: Path, like_cuda: None) -> None:
    found = config(folder, async_scheduling=False)
    assert found.use_v2_model_runner and not found.scheduler_config.async_scheduling
    assert found.scheduler_config.scheduler_cls == SECOND_SCHEDULER


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"enable_lora": True}, "--enable-lora"),
        ({"additional_config": {"nld": {"draft_threshold": 0.5}}}, "draft_threshold=0.5"),
        ({"additional_config": {"nld": {"seed_first": False}}}, "seed_first=False"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler_cls='vllm.v1.core"),
        ({"worker_cls": "vllm_nld.worker.NLDCPUWorker"}, "worker_cls='vllm_nld.worker.NLDCPUWorker'"),
    ],
)
def test_what_is_missing_there_takes_the_first(
    folder: Path, like_cuda: None, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], reason: str
) -> None:
    said: list[str] = []
    monkeypatch.setattr(runners.logger, "info_once", lambda text, *values: said.append(text % values))
    found = config(folder, **settings)
    assert not found.use_v2_model_runner
    assert said and reason in said[-1] and said[-1].startswith("Model runner: V1 (not on V2 yet: ")


def test_an_engine_process_names_the_same_reason(folder: Path, like_cuda: None) -> None:
    """It fills the configuration in again, with our worker and scheduler in it."""
    found = config(folder, enable_lora=True)
    assert found.scheduler_config.scheduler_cls == SCHEDULER
    assert runners.why_first(found) == ["--enable-lora with self-speculation"]


def test_without_triton_nothing_else_is_a_reason(folder: Path) -> None:
    found = config(folder, enable_lora=True)
    assert second_runner.describe(found, runners.why_first(found)).startswith("V1 (V2 wants Triton")


def test_the_environment_has_the_last_word(folder: Path, like_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert second_runner.describe(config(folder), []).startswith("V1 (VLLM_USE_V2_MODEL_RUNNER=0)")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match=r"does not yet support: draft_threshold=0.5 with self-speculation"):
        config(folder, additional_config={"nld": {"draft_threshold": 0.5}})


def test_other_proposers_stay_on_the_first(folder: Path, like_cuda: None) -> None:
    own = {"model": "vllm.v1.spec_decode.ngram_proposer.NgramProposer", "num_speculative_tokens": 2}
    found = config(folder, speculative_config=own, async_scheduling=None)
    assert not found.use_v2_model_runner and not found.scheduler_config.async_scheduling


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"mode": "diffusion", "seed_first": False}, r"\.seed_first=False on vLLM's second model runner"),
        ({"draft_threshold": 0.3}, "draft_threshold=0.3 on vLLM's second model runner; allowed: 0"),
        ({"prompt_lookup": 2}, "prompt_lookup=2 on vLLM's second model runner; allowed: 0"),
    ],
)
def test_requests_are_refused_by_name(own: dict[str, Any], message: str) -> None:
    params = SimpleNamespace(extra_args={"nld": own}, bad_words=None)
    request_options(params, EngineTraits(NLDOptions(), 8))
    with pytest.raises(NLDError, match=message):
        request_options(params, SECOND)
