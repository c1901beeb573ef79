"""The cluster file is one that Ray's own launcher accepts."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_ray_accepts_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    validate_config(prepare_config(config))
    assert config["available_node_types"]["head"]["resources"].get("GPU", 0) == 0
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
