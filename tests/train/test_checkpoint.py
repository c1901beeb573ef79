"""Checkpoints: complete or absent, and written beside training."""

import threading

import pytest
import torch

from cluster import storage
from sst.nn.optimizer import Update
from sst.train.checkpoint import (
    HELD_SHARE,
    LEAST_SECONDS,
    CheckpointWriter,
    copied,
    latest_checkpoint,
    write_checkpoint,
)


def position_of(step: int) -> dict:
    return {"step": step, "phase": 0, "phase_step": step, "stage": 1, "settings": ""}


def test_checkpoints_are_kept_so_that_a_valid_one_is_always_there(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = Update(model, 0.01, 0.0).state()

    def write(step: int) -> list[int]:
        write_checkpoint(str(tmp_path), copied(model, optimizer), **position_of(step))
        return sorted(int(path.name) for path in tmp_path.iterdir())

    assert [write(step) for step in (10, 20, 30)] == [[10], [10, 20], [20, 30]]
    # A crash between two files of a later one, and an unknown file.
    (tmp_path / f"{40:010d}").mkdir()
    (tmp_path / f"{40:010d}" / "model.safetensors").write_bytes(b"half")
    found = latest_checkpoint(str(tmp_path))
    assert found is not None and found[0].step == 30
    assert write(35) == [30, 35]
    # The newest is damaged: training goes on from the one before, and what it writes there outlives the damaged one.
    (tmp_path / f"{35:010d}" / "model.safetensors").write_bytes(b"damaged")
    assert write(32) == [30, 32]


def test_a_checkpoint_holds_the_weights_of_its_step_although_training_goes_on_meanwhile(tmp_path, monkeypatch):
    model, go_on, write = torch.nn.Linear(2, 2), threading.Event(), storage.write_bytes

    def slowly(url: str, data: bytes) -> None:
        assert go_on.wait(20)
        write(url, data)

    monkeypatch.setattr(storage, "write_bytes", slowly)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with CheckpointWriter(str(tmp_path)) as checkpoints:
        checkpoints.write(model, Update(model, 0.01, 0.0).state(), beside=True, **position_of(5))
        with torch.no_grad():
            for weight in model.parameters():
                weight += 1.0  # the next step, in place
        go_on.set()
    found = latest_checkpoint(str(tmp_path))
    assert found is not None and found[0].step == 5
    torch.testing.assert_close(found[1]["model.safetensors"], before, rtol=0, atol=0)


def test_what_goes_wrong_beside_training_ends_it_at_the_next_checkpoint(tmp_path, monkeypatch):
    def full(url: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_bytes", full)
    model = torch.nn.Linear(2, 2)
    with CheckpointWriter(str(tmp_path)) as checkpoints:
        checkpoints.write(model, {}, beside=True, **position_of(5))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.write(model, {}, beside=True, **position_of(10))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.write(model, {}, beside=False, **position_of(10))
    assert latest_checkpoint(str(tmp_path)) is None


def test_checkpoints_hold_training_up_for_a_hundredth_of_the_time_at_most(tmp_path, monkeypatch):
    """However long the copy of the weights takes; and never more often than every half minute."""
    model, now, held, at = torch.nn.Linear(2, 2), [0.0], [0.0], []

    def copy(*_):
        now[0] += held[0]
        return {}

    monkeypatch.setattr("sst.train.checkpoint.copied", copy)
    for held[0] in (0.01, 2.0):
        at.clear()
        now[0] = 0.0
        with CheckpointWriter(str(tmp_path), lambda: now[0]) as checkpoints:
            while now[0] < 3_000:
                now[0] += 1.0  # a step
                if checkpoints.due():
                    checkpoints.write(model, {}, beside=True, **position_of(int(now[0])))
                    checkpoints.settle()
                    at.append(now[0])
        gaps = [after - before for before, after in zip(at[:-1], at[1:], strict=True)]
        assert min(gaps) >= LEAST_SECONDS
        assert held[0] * len(gaps) <= HELD_SHARE * sum(gaps)
        assert max(gaps) < 2 * max(LEAST_SECONDS, held[0] / HELD_SHARE)


def test_no_checkpoint_is_due_while_the_last_is_being_written(tmp_path, monkeypatch):
    model, now, go_on, write = torch.nn.Linear(2, 2), [0.0], threading.Event(), storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda url, data: (go_on.wait(20), write(url, data)))
    with CheckpointWriter(str(tmp_path), lambda: now[0]) as checkpoints:
        checkpoints.write(model, {}, beside=True, **position_of(5))
        now[0] = 1_000.0
        assert not checkpoints.due()
        go_on.set()
        checkpoints.settle()
        assert checkpoints.due()
