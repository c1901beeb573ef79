"""The cluster files are ones that Ray's own launcher, or Kubernetes, accepts; checked without any of them."""

import shlex
from pathlib import Path

import pytest
import yaml

from jobs import train

ROOT = Path(__file__).parents[1]
LAUNCHED = ["ray_cluster.yaml", "docs/cluster/local.yaml"]


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_the_cluster_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read(name)
    validate_config(prepare_config(config))
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    setup = " ".join(config["setup_commands"])
    assert "-c constraints.txt" in setup and "[gpu,s3]" in setup
    assert {".venv", "runs", ".git"} <= set(config["rsync_exclude"])


def test_a_wrong_cluster_file_is_found():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read("ray_cluster.yaml")
    config["head_node_type"] = "absent"
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config(config))


def test_the_head_has_no_gpu_work_and_workers_come_and_go():
    kinds = read("ray_cluster.yaml")["available_node_types"]
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
        assert container["image"] and container["resources"]["limits"]["memory"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.train"]
    command = train.parse(words[3:])
    assert command.settings.resources.workers == "2:8"
