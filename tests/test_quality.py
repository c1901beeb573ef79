"""What training is for: on the embedded corpus, trained landmarks beat what there was before training."""

import pytest

from jobs import pack, train
from sst.report.evaluate_run import Run, evaluate_run

SHORT = """
--network.input-size 64 --stage1.warmup-iterations 250 --stage1.rounds 2 --stage1.round-iterations 100
--stage2.refine-rounds 1
""".split()


@pytest.mark.timeout(1200)
def test_trained_landmarks_beat_a_constant_guess_and_the_first_keypoints(tmp_path):
    pack.main(f"toy --count 700 --seed 3 --out {tmp_path / 'shards'}".split())
    place = ["--shards", str(tmp_path / "shards"), "--name", "quality", "--runs", str(tmp_path)]
    train.main(["toy-cpu", *place, "--tracking", f"sqlite:///{tmp_path}/mlflow.db", *SHORT])
    rows = evaluate_run(Run(run=str(tmp_path / "quality")))
    constant, _ = rows["constant guess"]
    before, first = rows["first keypoints, no training"]
    after, trained = rows["trained landmarks"]
    # NaN, where no first cluster is in 80 % of the images, counts as worse than any error.
    assert trained.landmarks_kept > first.landmarks_kept
    assert after < 0.75 * constant
    assert not after >= 0.85 * before
    assert not trained.backward >= 0.85 * first.backward
