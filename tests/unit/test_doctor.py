"""The report of ``vllm-nld doctor`` on the plugin and on parking."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_nld.vllm_glue import image_requirements, scheduling

doctor = importlib.import_module("vllm_nld.cli.doctor")  # the package has a function of that name


@pytest.mark.parametrize("allowed", [None, "vllm_nld", "other,vllm_nld"])
def test_environment_that_loads_the_plugin_passes(allowed: str | None) -> None:
    assert doctor.plugin_problem({} if allowed is None else {"VLLM_PLUGINS": allowed}) is None


@pytest.mark.parametrize(
    ("allowed", "advice"),
    [("", "vllm_nld"), ("other", "other,vllm_nld"), ("vllm_nld_x, vllm_nld", "vllm_nld_x, vllm_nld,vllm_nld")],
)
def test_environment_that_blocks_the_plugin_is_named(allowed: str, advice: str) -> None:
    problem = doctor.plugin_problem({"VLLM_PLUGINS": allowed})
    assert problem is not None
    assert problem.startswith(f"VLLM_PLUGINS={allowed} keeps vLLM from loading vllm_nld")
    assert problem.endswith(f"set it to {advice}")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert "not installed" in (doctor.plugin_problem({}) or "")


def test_doctor_says_whether_this_vllm_parks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.parking().startswith("on (off in servers with --enable-lora")
    monkeypatch.setattr(scheduling, "parking_obstacle", lambda: "SchedulerOutput has no preempted_req_ids")
    assert doctor.parking() == "off: this vLLM's SchedulerOutput has no preempted_req_ids"


def test_doctor_says_whether_images_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_requirements, "why_no_images", lambda: None)
    assert doctor.images() == "served"
    monkeypatch.setattr(image_requirements, "why_no_images", lambda: "images need torchvision")
    assert doctor.images() == "refused: images need torchvision"


def test_report_has_plugin_problem_and_parking(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    report = doctor.examine()
    assert any("VLLM_PLUGINS=other" in problem for problem in report["missing"])
    assert "parking" in report
    monkeypatch.setattr(doctor, "examine", lambda: report)
    assert not doctor.run(as_json=False)
    shown = capsys.readouterr().out
    assert "\nparking        " in shown
    assert "missing: VLLM_PLUGINS=other keeps" in shown


def config(**parts: Any) -> Any:
    scheduler = SimpleNamespace(scheduler_cls=parts.get("scheduler", scheduling.SCHEDULER))
    return SimpleNamespace(lora_config=parts.get("lora"), scheduler_config=scheduler)


def test_reason_for_no_parking_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scheduling.why_not_parked(config(lora=object())).startswith("--enable-lora")
    assert "--scheduler-cls 'my.Scheduler'" in scheduling.why_not_parked(config(scheduler="my.Scheduler"))
    monkeypatch.setattr(scheduling, "parking_obstacle", lambda: "SchedulerOutput has no preempted_req_ids")
    assert "no preempted_req_ids" in scheduling.why_not_parked(config())
