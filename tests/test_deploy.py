# SPDX-License-Identifier: Apache-2.0
"""Images, compose files and cluster examples: what they name exists, and fits.

Nothing is built and no cluster is asked. `make lint` has hadolint read the Dockerfiles,
tests/server/test_metrics.py asks a server for the board's metrics.
"""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from documented import vllm_parser

from vllm_dlm.plugin import TESTED_VLLM

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
YAML = sorted(
    [*DEPLOY.rglob("*.y*ml"), *(ROOT / ".github").rglob("*.yml"), ROOT / "mkdocs.yml"]
)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def serve(arguments: list[str]) -> Any:
    """What `vllm serve` makes of arguments, with this package's flags."""
    return vllm_parser().parse_args(["serve", *arguments])


def dockerfile(kind: str) -> dict[str, str]:
    """Instructions, each as one line; the last of those that come several times."""
    text = (ROOT / f"docker/Dockerfile.{kind}").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ").splitlines()
    return dict(line.split(" ", 1) for line in lines if line)


@pytest.mark.parametrize("file", YAML, ids=lambda file: str(file.relative_to(ROOT)))
def test_it_is_yaml(file: Path):
    class Reader(yaml.SafeLoader):
        """For mkdocs.yml, which names functions."""

    Reader.add_multi_constructor("!!python", lambda *_: None)
    Reader.add_multi_constructor("tag:yaml.org,2002:python", lambda *_: None)
    assert all(yaml.load_all(file.read_text(), Reader))


def test_the_cuda_image_is_that_of_the_newest_tested_vllm():
    image, tag = dockerfile("cuda")["FROM"].split(":")
    assert image == "vllm/vllm-openai"
    assert tag == f"v{TESTED_VLLM[-1]}"


def test_the_cpu_image_is_made_by_the_lock_s_python_and_make_env():
    steps = dockerfile("cpu")
    (python,) = re.findall(r"^python:(\d\.\d+)-", steps["FROM"])
    lock = (ROOT / "requirements/cpu.lock").read_text()
    assert f"Python {python}" in lock.splitlines()[0]
    text = (ROOT / "docker/Dockerfile.cpu").read_text()
    assert f"make env DEVICE=cpu PYTHON=python{python}\n" in text


def test_images_get_what_an_environment_is_made_of():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    needed = {"Makefile", "pyproject.toml", "requirements", "packaging", "vllm_dlm"}
    assert needed | {PROJECT["readme"], *PROJECT["license-files"]} == let_in
    assert all((ROOT / name).exists() for name in let_in)
    for kind in ("cpu", "cuda"):
        assert re.search(
            r"^COPY .*\. ", (ROOT / f"docker/Dockerfile.{kind}").read_text(), re.M
        )


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_image_serves_the_built_in_model(kind: str):
    steps = dockerfile(kind)
    assert yaml.safe_load(steps["ENTRYPOINT"]) == ["vllm", "serve"]
    assert serve(yaml.safe_load(steps["CMD"])).model_tag == "llada-tiny"


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_names_files_and_flags_that_exist(name: str):
    (compose,) = documents(name)
    server = compose["services"]["server"]
    assert serve(server["command"]).dlm_strategy == "threshold"
    assert (ROOT / server["build"]["dockerfile"]).is_file()
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).is_file(), source
            elif name == "compose.yaml":
                assert source in compose["volumes"]


def test_prometheus_and_grafana_find_each_other():
    (compose,) = documents("compose.yaml")
    services = compose["services"]
    (scraped,) = documents("prometheus.yml")[0]["scrape_configs"]
    (target,) = scraped["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert f"{port}:{port}" in services[name]["ports"]
    (source,) = documents("grafana/datasources.yaml")[0]["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    board = yaml.safe_load((DEPLOY / "grafana/vllm-dlm.json").read_text())
    uids = {panel["datasource"]["uid"] for panel in board["panels"]}
    assert uids == {source["uid"]}
    (provider,) = documents("grafana/dashboards.yaml")[0]["providers"]
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/vllm-dlm.json" in mounted


def test_kubernetes_example_fits_together():
    by_kind = {document["kind"]: document for document in documents("kubernetes.yaml")}
    assert by_kind.keys() == {"Service", "PersistentVolumeClaim", "Deployment"}
    template = by_kind["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert by_kind["Service"]["spec"]["selector"] == labels
    assert by_kind["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    (container,) = template["spec"]["containers"]
    asked = serve(container["args"])
    (port,) = container["ports"]
    assert asked.port == port["containerPort"]
    assert by_kind["Service"]["spec"]["ports"][0]["port"] == port["containerPort"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert mounts == volumes.keys()
    claim = volumes["checkpoints"]["persistentVolumeClaim"]["claimName"]
    assert claim == by_kind["PersistentVolumeClaim"]["metadata"]["name"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == asked.tensor_parallel_size * asked.data_parallel_size


def test_kuberay_example_fits_together():
    cluster, job = documents("kuberay.yaml")
    assert (cluster["kind"], job["kind"]) == ("RayCluster", "RayJob")
    selected = job["spec"]["clusterSelector"]
    assert selected == {"ray.io/cluster": cluster["metadata"]["name"]}
    program, command, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("vllm", "serve")
    asked = serve(arguments)
    assert asked.distributed_executor_backend == "ray"
    spec = cluster["spec"]
    nodes = [(1, spec["headGroupSpec"])]
    nodes += [(group["replicas"], group) for group in spec["workerGroupSpecs"]]
    gpus = 0
    for replicas, group in nodes:
        (container,) = group["template"]["spec"]["containers"]
        gpus += replicas * container["resources"]["limits"]["nvidia.com/gpu"]
    assert asked.tensor_parallel_size == gpus
    lock = (ROOT / "requirements/dev.lock").read_text()
    assert f"\nray=={spec['rayVersion']}\n" in lock


def test_no_registry_is_named_but_a_placeholder():
    for file in (*DEPLOY.rglob("*.y*ml"), *(ROOT / "docker").iterdir()):
        for image in re.findall(r"^(?:FROM |.*image: )(\S+)$", file.read_text(), re.M):
            host = image.rpartition("/")[0].split("/")[0]
            assert "." not in host or host == "registry.example", image
