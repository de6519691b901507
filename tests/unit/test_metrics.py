"""From a worker's counts to ``/metrics``."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_nld import MODEL_TYPE
from vllm_nld.accounting import Ledger, Tally
from vllm_nld.metrics import METRICS, Publisher, Sample, read_samples, snapshot_path, worker_samples

ROOT = Path(__file__).parents[2]
SAMPLES = [Sample("vllm:nld_tokens", {"mode": "ar"}, 7), Sample("vllm:nld_acceptance_length", {}, 2.5)]


def scrape(paths: dict[str, Path]) -> str:
    from vllm_nld.stat_logger import SnapshotCollector

    registry = CollectorRegistry()
    registry.register(SnapshotCollector("m", paths))
    return generate_latest(registry).decode()


def test_what_is_published_is_scraped(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "a.json")
    assert scrape({"0": publisher.path}) == "", "nothing yet"
    publisher.publish(lambda: SAMPLES)
    assert read_samples(publisher.path) == SAMPLES
    text = scrape({"0": publisher.path, "1": tmp_path / "absent.json"})
    assert 'vllm:nld_tokens_total{engine="0",mode="ar",model_name="m"} 7.0' in text
    assert 'vllm:nld_acceptance_length{engine="0",model_name="m"} 2.5' in text
    assert stat.S_IMODE(publisher.path.stat().st_mode) == 0o600
    publisher.remove()
    assert scrape({"0": publisher.path}) == ""


def test_publishing_is_rare_unless_asked_for(tmp_path: Path) -> None:
    publisher, calls = Publisher(tmp_path / "a.json"), []
    for _ in range(100):
        publisher.publish(lambda: calls.append(1) or SAMPLES)
    assert len(calls) == 1
    publisher.publish(lambda: calls.append(1) or SAMPLES, now=True)
    assert len(calls) == 2


def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Publisher(tmp_path / "a.json")
    publisher.publish(lambda: SAMPLES, now=True)
    seen: list[Any] = []
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        seen.append(read_samples(publisher.path))  # the new text is written, but not in place
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    publisher.publish(lambda: SAMPLES[:1], now=True)
    assert seen == [SAMPLES]
    assert read_samples(publisher.path) == SAMPLES[:1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_disk_that_fails_does_not_stop_the_engine(tmp_path: Path) -> None:
    Publisher(tmp_path / "absent" / "a.json").publish(lambda: SAMPLES, now=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"samples": [{"x": 1}]}', '{"samples": 3}'])
def test_an_unreadable_snapshot_is_no_snapshot(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert read_samples(tmp_path / "a.json") == []


def config(model_type: str = MODEL_TYPE, speculative: Any = None) -> Any:
    model = SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type), model="/x", served_model_name="m")
    return SimpleNamespace(
        instance_id="abc_dp1",
        parallel_config=SimpleNamespace(data_parallel_rank=0, data_parallel_index=1),  # as in a dense model's engine 1
        model_config=model,
        speculative_config=speculative,
        additional_config={},
    )


def test_both_processes_find_the_same_file() -> None:
    assert snapshot_path(config()).name == f"vllm-nld-{os.getuid()}-abc-1.json"
    assert snapshot_path(config(), 1) == snapshot_path(config())
    assert snapshot_path(config(), 0) != snapshot_path(config())


def test_the_api_process_registers_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import atexit

    from prometheus_client.registry import REGISTRY

    from vllm_nld import stat_logger

    at_exit: list[Any] = []
    warnings: list[str] = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(atexit, "register", lambda function, *args: at_exit.append((function, args)))
    monkeypatch.setattr(stat_logger.logger, "warning", lambda text, *args: warnings.append(text % args))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    engine = config(speculative=SimpleNamespace(model="vllm_nld.SelfSpeculation", num_speculative_tokens=3))
    made = [stat_logger.NLDStatLogger(engine, [0, 1]) for _ in range(2)][-1]
    own = [c for c in REGISTRY._collector_to_names if isinstance(c, stat_logger.SnapshotCollector)]
    try:
        assert len(own) == 1, "the second engine of a process replaces the first"
        assert generate_latest(REGISTRY).decode().count("vllm:nld_") == 0
        assert warnings == [], "no engine has run yet"
        Publisher(snapshot_path(engine)).publish(lambda: SAMPLES)
        (tmp_path / f"{snapshot_path(engine).name}.part").write_text("{")  # of a worker killed while writing
        for index in (0, 1):
            made.record(None, None, engine_idx=index)
        for _ in range(2):
            assert (
                'vllm:nld_tokens_total{engine="1",mode="ar",model_name="m"} 7.0' in generate_latest(REGISTRY).decode()
            )
        assert len(warnings) == 1, "once, and only of the engine whose file is missing"
        assert "engine 0" in warnings[0]
        for function, args in at_exit:
            function(*args)
        assert list(tmp_path.iterdir()) == []
    finally:
        for collector in own:
            REGISTRY.unregister(collector)


def test_several_api_servers_get_one_warning_and_no_metrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from prometheus_client.registry import REGISTRY

    from vllm_nld import stat_logger

    warnings: list[str] = []
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(stat_logger.logger, "warning", lambda text, *args: warnings.append(text % args))
    speculative = SimpleNamespace(model="vllm_nld.SelfSpeculation", num_speculative_tokens=3)
    stat_logger.NLDStatLogger(config(speculative=speculative), [0])
    assert len(warnings) == 1
    assert not [c for c in REGISTRY._collector_to_names if isinstance(c, stat_logger.SnapshotCollector)]


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    publisher = Publisher(tmp_path / "a.json")
    publisher.path.symlink_to(victim)
    publisher.path.with_suffix(f".{os.getpid()}").symlink_to(victim)
    publisher.publish(lambda: SAMPLES)
    assert victim.read_text() == "precious"
    assert read_samples(publisher.path) == SAMPLES


@pytest.mark.parametrize(
    ("model_type", "model"), [("llama", "vllm_nld.SelfSpeculation"), (MODEL_TYPE, None), (MODEL_TYPE, "ngram")]
)
def test_nothing_is_registered_for_others(model_type: str, model: str | None) -> None:
    from prometheus_client.registry import REGISTRY

    from vllm_nld.stat_logger import NLDStatLogger, SnapshotCollector

    speculative = None if model is None else SimpleNamespace(model=model, num_speculative_tokens=3)
    NLDStatLogger(config(model_type, speculative), [0])
    assert not [c for c in REGISTRY._collector_to_names if isinstance(c, SnapshotCollector)]


def test_worker_samples_follow_the_table() -> None:
    ledger, request = Ledger(), Tally()
    ledger.causal(request, "prefill", "self_speculation", 1, 0)
    ledger.block(request, "draft", "self_speculation", 1)
    ledger.causal(request, "verify", "self_speculation", 4, 3)
    ledger.block(Tally(), "denoise", "diffusion", 5)
    ledger.causal(Tally(), "commit", "diffusion", 16, 15)
    auto = SimpleNamespace(decisions={("ar", 1): 3, ("self_speculation", 8): 2})
    proposer = SimpleNamespace(ledger=ledger, auto=auto, draft_pass=SimpleNamespace(forwards=6))
    found = {(s.name, *s.labels.values()): s.value for s in worker_samples(proposer, 3)}
    assert found["vllm:nld_request_forwards", "denoise"] == 5
    assert found["vllm:nld_tokens", "diffusion"] == 16
    assert found["vllm:nld_decisions", "self_speculation", "8"] == 2
    assert found["vllm:nld_tokens_per_forward", "self_speculation"] == 5 / 2
    assert found["vllm:nld_tokens_per_forward", "diffusion"] == pytest.approx(16 / 6)
    assert found[("vllm:nld_acceptance_length",)] == 4.0
    assert {name for name, *_ in found} == set(METRICS), "every metric has a value here"
    for sample in worker_samples(proposer, 3):
        assert tuple(sample.labels) == METRICS[sample.name].labels
    assert "acceptance length 4.00" in request.summary()


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    text = (ROOT / "examples/grafana/nld_dashboard.json").read_text()
    dashboard = json.loads(text)
    assert len(dashboard["panels"]) >= 8
    own = set(re.findall(r"vllm:nld_\w+", text))
    known = {name + ("_total" if metric.kind == "counter" else "") for name, metric in METRICS.items()}
    assert own <= known
    assert own
    import vllm

    source = (Path(vllm.__file__).parent / "v1/metrics/loggers.py").read_text()
    for name in set(re.findall(r"vllm:\w+", text)) - own:
        assert re.sub(r"_(bucket|sum|count|total)$", "", name) in source, name


def test_every_metric_is_documented() -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    for name in METRICS:
        assert name in text
