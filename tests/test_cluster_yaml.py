"""The cluster files are ones that Ray's launcher, or Kubernetes, accepts, and all install alike; none is run."""

import fnmatch
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from jobs import train

ROOT = Path(__file__).parents[1]
LAUNCHED = ["ray_cluster.yaml", "docs/cluster/local.yaml"]


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def dockerfile() -> list[str]:
    """Instructions of the Dockerfile, one a line, with the defaults of its build arguments put in."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for name, default in re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE):
        text = text.replace(f"${name}", default)
    return [line for line in text.splitlines() if line]


def built_images() -> set[str]:
    """Names that the Dockerfile's own first lines give to what it builds."""
    return set(re.findall(r"docker build -t (\S+)", (ROOT / "Dockerfile").read_text()))


def installing() -> dict[str, list[str]]:
    """The commands by which each kind of cluster sets its machines up."""
    commands = {name: read(name)["setup_commands"] for name in LAUNCHED}
    return commands | {"Dockerfile": [line.removeprefix("RUN ") for line in dockerfile() if line.startswith("RUN ")]}


@pytest.mark.parametrize("name", [*LAUNCHED, "Dockerfile"])
def test_machines_and_images_are_installed_by_the_makefile_with_the_same_python_and_extras(name):
    commands = " ; ".join(installing()[name])
    assert not re.search(r"\bpip\b|-m venv|requirements", commands), "only the Makefile says how to install"
    lines = set(re.findall(r"make install [^;&]*", commands))
    (made,) = {re.sub(r"VENV=\S+", "VENV=venv", line).strip() for line in lines}
    assert made == "make install EXTRAS=gpu,s3 VENV=venv PYTHON=python3.12"
    shown = subprocess.run(["make", "-n", *shlex.split(made)[1:]], cwd=ROOT, check=True, capture_output=True, text=True)
    (pip,) = [shlex.split(line) for line in shown.stdout.splitlines() if " pip install " in line]
    assert pip[0] == "venv/bin/python" and pip[pip.index("-c") + 1] == "constraints.txt"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.fullmatch(r"\.\[(.*)\]", pip[pip.index("-e") + 1])[1].split(",")
    assert set(extras) == {"gpu", "s3"} <= set(project["optional-dependencies"])
    assert "Programming Language :: Python :: 3.12" in project["classifiers"]


def test_the_image_has_the_python_that_it_installs_with_and_nobody_in_it_is_root():
    lines = dockerfile()
    assert [line for line in lines if line.startswith("FROM ")] == ["FROM python:3.12-slim"]
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["landmarks"]
    after = lines[lines.index("USER landmarks") :]
    assert {line for line in lines if "make install" in line} <= set(after)
    assert all("--chown=landmarks" in line for line in after if line.startswith("COPY "))


def test_what_the_image_needs_is_in_its_context_and_what_is_large_or_private_is_not():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    found = {
        p.parent.name for p in ROOT.glob("*/__init__.py") if any(fnmatch.fnmatch(p.parent.name, i) for i in packages)
    }
    copied = {word for line in dockerfile() if line.startswith("COPY ") for word in line.split()[2:-1]} - {"."}
    assert {"cluster", "sst", "jobs"} <= found <= kept
    assert {name.rstrip("*") for name in copied} | {settings["project"]["readme"]} <= kept
    assert not kept & {".git", ".venv", "runs", "tests", "mlruns", "mlflow.db"}


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_the_cluster_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read(name)
    validate_config(prepare_config(config))
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert {".venv", "runs", ".git"} <= set(config["rsync_exclude"])


def test_a_wrong_cluster_file_is_found():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read("ray_cluster.yaml")
    config["head_node_type"] = "absent"
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config(config))


def test_the_head_has_no_gpu_work_and_workers_come_and_go():
    kinds = read("ray_cluster.yaml")["available_node_types"]
    # Without an image Ray would take one of 2018, where nothing of this project installs.
    assert len({kind["node_config"]["ImageId"] for kind in kinds.values()}) == 1
    assert kinds["head"]["resources"].get("GPU", 0) == 0
    worker = kinds["gpu_worker"]
    assert worker["resources"]["GPU"] == 1 and worker["min_workers"] == 0 < worker["max_workers"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_the_kubernetes_job_is_whole_and_runs_a_command_that_parses():
    job = read("docs/cluster/kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] in built_images() and container["resources"]["limits"]["memory"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.train"]
    command = train.parse(words[3:])
    assert command.settings.resources.workers == "2:8"
