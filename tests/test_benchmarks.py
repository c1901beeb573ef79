"""Benchmarks that read what runs leave behind must understand it."""

from benchmarks.round import rounds_of
from cluster.actor import read_sample
from cluster.kmeans import fit
from sst.data.corpus import open_corpus
from sst.run.claim import claim
from sst.run.metrics import MetricsFile
from sst.train.run_directory import RunDirectory
from sst.train.tools import Tools
from tests.small import SETTINGS, train_locally, write_toy


def test_the_parts_of_a_round_are_those_that_the_run_notes(tmp_path):
    corpus, run = str(tmp_path / "corpus"), tmp_path / "run"
    write_toy(corpus, train=24, test=8)
    claim(RunDirectory(str(run)), SETTINGS, open_corpus(corpus))

    def solve(sample, asked):
        return fit(read_sample(sample), asked)

    train_locally(corpus, str(run), Tools(solve, log=MetricsFile(str(run)).write))
    rounds = rounds_of(run)
    assert [each["steps"] for each in rounds] == [SETTINGS.stage1.round_iterations] * SETTINGS.stage1.rounds
    for each in rounds:
        parts = {name: seconds for name, seconds in each.items() if name not in ("steps", "all")}
        assert all(seconds >= 0 for name, seconds in parts.items() if name != "rest") and each["training"] > 0
        # What is noted is rounded to tenths of a second, and short; it covers a round all the same.
        assert -0.5 < each["rest"] < 0.5 * each["all"] + 0.5
