"""What a sweep varies, and how trials are drawn from it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sst.config import TrainSettings
from sst.errors import UserError
from sst.presets import PRESETS
from sst.tune.search_space import default_space, draw_trials, parse_space, read_space, with_values

SETTINGS = PRESETS["faces-cpu"][1].with_workers("2")


def trials(space: dict, count: int, seed: int = 0) -> list[dict]:
    return draw_trials(parse_space(space, SETTINGS), count, seed)


@pytest.mark.parametrize(
    ("told", "values"),
    [
        ("20,30,50", [20, 30, 50]),
        ([20, 30], [20, 30]),
        ("20", [20]),
        (20, [20]),
    ],
)
def test_few_combinations_are_all_tried(told, values):
    assert trials({"cluster.clusters": told}, 8) == [{"cluster.clusters": value} for value in values]


def test_numbers_are_numbers_and_words_are_words():
    drawn = trials({"stage1.learning_rate": "5e-4,1e-3", "cluster.keep_identities": "true,false"}, 8)
    assert {type(trial["stage1.learning_rate"]) for trial in drawn} == {float}
    assert [trial["cluster.keep_identities"] for trial in drawn] == [True, False, True, False]
    assert trials({"cluster.backend": "torch,cuml"}, 8)[1] == {"cluster.backend": "cuml"}


def test_combinations_of_lists_are_a_grid():
    drawn = trials({"cluster.clusters": "20,30", "stage1.threshold": [0.1, 0.2, 0.3]}, 6)
    assert len(drawn) == 6 and len({tuple(trial.values()) for trial in drawn}) == 6


@given(st.integers(2, 40), st.integers(0, 100))
def test_every_part_of_a_range_is_used_once(count, seed):
    drawn = trials({"stage1.learning_rate": "1e-4..1e-3:log", "stage2.visible": "0.1..0.9"}, count, seed)
    assert len(drawn) == count
    parts = sorted(int((trial["stage2.visible"] - 0.1) / 0.8 * count - 1e-3) for trial in drawn)
    assert parts == list(range(count)) or max(abs(a - b) for a, b in zip(parts, range(count), strict=True)) <= 1
    assert all(1e-4 <= trial["stage1.learning_rate"] <= 1e-3 for trial in drawn)
    assert drawn == trials({"stage1.learning_rate": "1e-4..1e-3:log", "stage2.visible": "0.1..0.9"}, count, seed)


@given(st.integers(2, 30), st.integers(0, 20), st.integers(1, 25))
def test_whole_ranges_give_whole_numbers_within_them(low, width, count):
    drawn = trials({"cluster.clusters": f"{low}..{low + width + 1}"}, count)
    values = [trial["cluster.clusters"] for trial in drawn]
    assert all(type(value) is int and low <= value <= low + width + 1 for value in values)
    assert len(set(values)) == len(values)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"cluster.cluster": "2,3"}, "did you mean cluster.clusters"),
        ({"cluster": "2,3"}, "no such setting"),
        ({"cluster.clusters": "1,20"}, "greater than or equal to 2"),
        ({"cluster.clusters": "many"}, "valid integer"),
        ({"stage1.learning_rate": "1e-3..1e-4"}, "must be below"),
        ({"stage1.learning_rate": "0..1:log"}, "begin above 0"),
        ({"stage1.learning_rate": "0.1..1:lin"}, "only :log"),
        ({"stage1.learning_rate": "a..b"}, "could not convert"),
        ({"stage1.pairs": "16,3"}, "at least 2 per worker"),
        ({"cluster.clusters": []}, "at least 1 item"),
        ({"cluster.clusters": {"low": 2, "top": 5}}, "top"),
        ({}, "nothing varies"),
    ],
)
def test_a_wrong_space_is_refused_before_anything_is_trained(space, said):
    with pytest.raises(UserError, match="search space") as caught:
        parse_space(space, SETTINGS)
    assert said in str(caught.value)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(UserError, match=r"cluster\.cluster: .*stage1\.pairs"):
        parse_space({"cluster.cluster": "2", "stage1.pairs": "3"}, SETTINGS)


def test_a_space_is_read_from_yaml_without_its_tags(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "cluster.clusters: [20, 30]\nstage1.learning_rate: 1e-4..1e-3:log\nstage2.visible: {low: 0.1, high: 0.4}\n"
    )
    space = parse_space(read_space(str(file)), SETTINGS)
    assert list(space.root) == ["cluster.clusters", "stage1.learning_rate", "stage2.visible"]
    for wrong in ("- a\n", "!!python/object/apply:os.system ['true']\n", "a: [\n", "1: 2\n"):
        file.write_text(wrong)
        with pytest.raises(UserError, match="space.yaml"):
            read_space(str(file))
    with pytest.raises(UserError, match="absent.yaml"):
        read_space(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_default_space(preset):
    settings = PRESETS[preset][1]
    drawn = draw_trials(parse_space(default_space(settings), settings), 8, 0)
    assert len(drawn) == 8 and all(isinstance(with_values(settings, trial), TrainSettings) for trial in drawn)
