"""Whole runs through the command, as short as they can be: how to start one, and what it leaves."""

import json
from pathlib import Path

TINY = """
--network.input-size 64 --network.width 16 --network.depth 2 --network.groups 2 --network.descriptor-size 16
--keypoints.max-num-keypoints 20
--cluster.clusters 8 --stage1.warmup-iterations 10 --stage1.rounds 2 --stage1.round-iterations 10
--stage1.pairs 4 --stage1.min-labels 2 --stage1.threshold 0.05 --stage2.iterations 30 --stage2.batch 4
--stage2.min-population 2 --stage2.merge-after 10 --stage2.merge-every 10 --resources.checkpoint-steps 5
--stage2.refine-rounds 1 --stage2.refine-iterations 10 --stage2.refine-confidence 0.0
--stage2.visible 0.02 --workers 2
""".split()  # thirty steps leave every landmark unsure, and how unsure depends on the processor


def arguments(folder: Path, shards: Path, name: str) -> list[str]:
    return [
        *("toy-cpu", "--shards", str(shards), "--name", name, "--runs", str(folder / "runs")),
        *("--tracking", f"sqlite:///{folder}/mlflow.db", *TINY),
    ]


def lines(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def model_bytes(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def all_labels(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("rounds/*/labels/*.npz"))}
