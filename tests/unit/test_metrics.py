"""From a worker's counts to ``/metrics``."""

from __future__ import annotations

import json
import os
import re
import stat
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_nld import plugin
from vllm_nld.names import MODEL_TYPE
from vllm_nld.serving.ledger import DECODE_KINDS, Ledger, Tally
from vllm_nld.serving.metrics import (
    METRICS,
    Publisher,
    Sample,
    find_snapshots,
    read_samples,
    snapshot_path,
    snapshot_prefix,
    worker_samples,
)

ROOT = Path(__file__).parents[2]
SAMPLES = [Sample("vllm:nld_tokens", {"mode": "ar"}, 7), Sample("vllm:nld_acceptance_length", {}, 2.5)]


def scrape(prefix: Path) -> str:
    from vllm_nld.serving.collector import SnapshotCollector

    registry = CollectorRegistry()
    registry.register(SnapshotCollector("m", prefix))
    return generate_latest(registry).decode()


def test_published_values_are_scraped(tmp_path: Path) -> None:
    publisher, prefix = Publisher(tmp_path / "a-0.json"), tmp_path / "a-"
    assert scrape(prefix) == "", "nothing yet"
    publisher.publish(lambda: SAMPLES)
    assert read_samples(publisher.path) == SAMPLES
    (tmp_path / "a-1.json.part").write_text("{")  # a worker is writing its first
    (tmp_path / "b-1.json").write_text(publisher.path.read_text())  # another engine's
    text = scrape(prefix)
    assert 'vllm:nld_tokens_total{engine="0",mode="ar",model_name="m"} 7.0' in text
    assert 'vllm:nld_acceptance_length{engine="0",model_name="m"} 2.5' in text
    assert 'engine="1"' not in text
    Publisher(tmp_path / "a-1.json").publish(lambda: SAMPLES)
    assert 'vllm:nld_tokens_total{engine="1",mode="ar",model_name="m"} 7.0' in scrape(prefix)
    assert stat.S_IMODE(publisher.path.stat().st_mode) == 0o600
    publisher.remove()
    assert 'engine="0"' not in scrape(prefix)
    assert (tmp_path / "a-1.json").exists(), "another worker's"


def test_publishing_is_rare_unless_forced(tmp_path: Path) -> None:
    publisher, calls = Publisher(tmp_path / "a.json"), []
    for _ in range(100):
        publisher.publish(lambda: calls.append(1) or SAMPLES)
    assert len(calls) == 1
    publisher.publish(lambda: calls.append(1) or SAMPLES, now=True)
    assert len(calls) == 2


def test_reader_never_gets_a_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Publisher(tmp_path / "a.json")
    publisher.publish(lambda: SAMPLES, now=True)
    seen: list[Any] = []
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        seen.append(read_samples(publisher.path))  # the new text is written, but not yet renamed
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    publisher.publish(lambda: SAMPLES[:1], now=True)
    assert seen == [SAMPLES]
    assert read_samples(publisher.path) == SAMPLES[:1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_failing_disk_does_not_stop_the_engine(tmp_path: Path) -> None:
    Publisher(tmp_path / "absent" / "a.json").publish(lambda: SAMPLES, now=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"samples": [{"x": 1}]}', '{"samples": 3}'])
def test_unreadable_snapshot_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert read_samples(tmp_path / "a.json") == []


def config(model_type: str = MODEL_TYPE, speculative: Any = None) -> Any:
    model = SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type), model="/x", served_model_name="m")
    return SimpleNamespace(
        instance_id="abc_dp1",
        lora_config=None,
        parallel_config=SimpleNamespace(data_parallel_rank=0, data_parallel_index=1),  # as in a dense model's engine 1
        model_config=model,
        speculative_config=speculative,
        scheduler_config=SimpleNamespace(scheduler_cls="vllm_nld.scheduler.NLDScheduler"),
        additional_config={},
    )


def speculating(model: str = "vllm_nld.SelfSpeculation") -> Any:
    return config(speculative=SimpleNamespace(model=model, num_speculative_tokens=3))


def collectors() -> list[Any]:
    from prometheus_client.registry import REGISTRY

    from vllm_nld.serving.collector import SnapshotCollector

    return [c for c in REGISTRY._collector_to_names if isinstance(c, SnapshotCollector)]


@pytest.fixture
def warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The API process's warnings, in a separate environment; registrations are undone."""
    from prometheus_client.registry import REGISTRY

    from vllm_nld.serving import collector

    shown: list[str] = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(collector.logger, "warning", lambda text, *args: shown.append(text % args))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    yield shown
    for made in collectors():
        REGISTRY.unregister(made)


def test_both_processes_find_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    worker, api = config(), config()
    api.instance_id, api.parallel_config.data_parallel_index = "abc", 0
    assert snapshot_path(worker).name == f"vllm-nld-{os.getuid()}-abc-1.json"
    snapshot_path(worker).write_text("{}")
    assert find_snapshots(snapshot_prefix(api)) == {"1": snapshot_path(worker)}
    api.instance_id = "ab"
    assert find_snapshots(snapshot_prefix(api)) == {}


def test_first_request_registers_the_collector(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import atexit

    from prometheus_client.registry import REGISTRY

    at_exit: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda function, *args: at_exit.append((function, args)))
    engines = [speculating(), speculating()]
    for engine in (engines[0], engines[0], engines[1]):
        plugin.admit(engine, SimpleNamespace(extra_args=None))
        assert len(collectors()) == 1, "the second engine of a process replaces the first"
    assert len(at_exit) == len(engines), "once per engine"
    assert generate_latest(REGISTRY).decode().count("vllm:nld_") == 0
    Publisher(snapshot_path(engines[1])).publish(lambda: SAMPLES)
    (tmp_path / f"{snapshot_path(engines[1]).name}.part").write_text("{")  # of a worker killed while writing
    assert 'vllm:nld_tokens_total{engine="1",mode="ar",model_name="m"} 7.0' in generate_latest(REGISTRY).decode()
    for function, args in at_exit:
        function(*args)
    assert list(tmp_path.iterdir()) == []
    assert warnings == []


def test_unreachable_worker_gives_one_warning(warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_nld.serving import collector

    now = time.monotonic()
    monkeypatch.setattr(collector, "time", SimpleNamespace(monotonic=lambda: now))
    plugin.admit(speculating(), SimpleNamespace(extra_args=None))
    (made,) = collectors()
    list(made.collect())
    assert warnings == [], "the first step may take a while"
    now += collector.PATIENCE_SECONDS
    for _ in range(2):
        list(made.collect())
    assert len(warnings) == 1
    assert str(snapshot_prefix(config())) in warnings[0]


def test_several_api_servers_get_one_warning_and_no_metrics(
    warnings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    engine = speculating()
    for _ in range(2):
        plugin.admit(engine, SimpleNamespace(extra_args=None))
    assert len(warnings) == 1
    assert not collectors()


def test_link_at_the_path_is_not_followed(tmp_path: Path) -> None:
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
def test_nothing_is_registered_for_other_models(model_type: str, model: str | None, warnings: list[str]) -> None:
    speculative = None if model is None else SimpleNamespace(model=model, num_speculative_tokens=3)
    plugin.admit(config(model_type, speculative), SimpleNamespace(extra_args=None))
    assert not collectors()


def test_no_stat_logger_is_registered() -> None:
    """With one, vLLM would keep statistics for every model, even with --disable-log-stats."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert list(groups) == ["vllm.general_plugins"]


def test_worker_samples_follow_the_table() -> None:
    ledger, request = Ledger(), Tally()
    ledger.causal(request, "prefill", "self_speculation", 1, 0)
    ledger.drafted(request, 1)
    ledger.causal(request, "verify", "self_speculation", 4, 3)
    ledger.drafted(request, 1)  # a block that is never verified because the request ends
    ledger.branched(request, "guess")
    ledger.denoised(Tally(), 5)
    ledger.causal(Tally(), "commit", "diffusion", 16, 15)
    auto = SimpleNamespace(decisions={("ar", 1): 3, ("self_speculation", 8): 2})
    proposer = SimpleNamespace(ledger=ledger, auto=auto, draft_pass=SimpleNamespace(forwards=6))
    found = {(s.name, *s.labels.values()): s.value for s in worker_samples(proposer, 3)}
    assert found["vllm:nld_request_forwards", "denoise"] == 5
    assert found["vllm:nld_tokens", "diffusion"] == 16
    assert found["vllm:nld_decisions", "self_speculation", "8"] == 2
    assert found["vllm:nld_tokens_per_forward", "self_speculation"] == 5 / 3
    assert found["vllm:nld_tokens_per_forward", "diffusion"] == pytest.approx(16 / 6)
    assert found[("vllm:nld_acceptance_length",)] == 4.0
    assert {name for name, *_ in found} == set(METRICS), "every metric has a value here"
    for sample in worker_samples(proposer, 3):
        assert tuple(sample.labels) == METRICS[sample.name].labels
    assert "acceptance length 4.00" in request.summary()


def test_dashboard_uses_existing_metrics() -> None:
    """By their whole names, labels and label values."""
    text = (ROOT / "examples/grafana/nld_dashboard.json").read_text()
    dashboard = json.loads(text)
    assert len(dashboard["panels"]) >= 8
    own = set(re.findall(r"vllm:nld_\w+", text))
    known = {name + ("_total" if metric.kind == "counter" else ""): metric for name, metric in METRICS.items()}
    assert own == set(known), "every metric has its place in it"
    import vllm

    source = (Path(vllm.__file__).parent / "v1/metrics/loggers.py").read_text()
    for name in set(re.findall(r"vllm:\w+", text)) - own:
        assert f'"{re.sub(r"_(bucket|sum|count|total)$", "", name)}"' in source, name
    values = {
        "mode": {"ar", "self_speculation", "diffusion"},
        "kind": {k for kinds in DECODE_KINDS.values() for k in kinds} | {"guess", "mask"},
    }
    for expression in (target["expr"] for panel in dashboard["panels"] for target in panel["targets"]):
        for name, selector in re.findall(r"(vllm:nld_\w+)\{([^}]*)\}", expression):
            for label, value in re.findall(r'(\w+)=~?"([^"]*)"', selector):
                assert label in (*known[name].labels, "model_name"), (name, label)
                assert label == "model_name" or set(value.split("|")) <= values[label], (name, value)
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            for name in re.findall(r"vllm:nld_\w+", expression):
                assert set(labels.split(", ")) <= set(known[name].labels), (name, labels)


def test_every_metric_is_documented() -> None:
    text = (ROOT / "docs/operate/metrics.md").read_text()
    for name in METRICS:
        assert name in text
