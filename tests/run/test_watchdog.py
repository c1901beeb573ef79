"""A group that hangs ends itself, and says who was where."""

import threading
import time

import pytest

from sst.errors import RunFailedError
from sst.run.distributed import SilenceCheck
from sst.run.watchdog import Attendance, Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_group_is_quiet_only_while_none_of_its_workers_gets_further() -> None:
    clock = Clock()
    roll = Attendance(clock)
    assert roll.sign(0, 2, "a", 1, "in step 1") == 0.0
    clock.now += 5
    assert roll.sign(1, 2, "b", 1, "in step 1") == 0.0, "a worker that is new gets further by being there"
    clock.now += 5
    assert roll.sign(0, 2, "a", 1, "in step 1") == 5.0
    clock.now += 5
    assert roll.sign(1, 2, "b", 2, "in step 2") == 0.0 and roll.sign(0, 2, "a", 1, "in step 1") == 0.0
    clock.now += 7
    assert roll.sign(0, 2, "a", 1, "in step 1") == roll.quiet() == 7.0
    assert roll.sign(0, 2, "started again", 1, "starting") == 0.0, "another process in its place gets further"


def test_it_is_said_who_is_silent_and_where_the_others_are() -> None:
    clock = Clock()
    roll = Attendance(clock)
    roll.sign(0, 3, "a", 7, "in step 7")
    roll.sign(1, 3, "b", 6, "waiting for the images of step 6")
    roll.sign(2, 3, "c", 6, "in step 6")
    clock.now += 60
    roll.sign(0, 3, "a", 7, "in step 7")
    roll.sign(2, 3, "c", 6, "in step 6")
    told = roll.describe(silent=30)
    assert told == (
        "rank 0 in step 7; rank 1 has given no sign of life for 60 s, last waiting for the images of step 6; "
        "rank 2 in step 6"
    )
    roll.sign(0, 2, "a", 8, "in step 8")
    assert "rank 2" not in roll.describe(silent=30), "the group has become smaller"


def test_a_hang_is_told_once() -> None:
    roll = Attendance()
    for _ in range(2):
        roll.note("rank 1 hangs")
    assert roll.take() == ["rank 1 hangs"] and roll.take() == []


def watched(rank: int, roll: Attendance, ended: list[str], seconds: float = 0.8) -> Watchdog:
    return Watchdog(rank, 2, seconds, roll, ended.append)


def test_workers_that_wait_for_one_that_was_stopped_end_and_name_it() -> None:
    """The stopped one is a worker whose watchdog gives no sign either, as after SIGSTOP."""
    roll, ended = Attendance(), list[str]()
    stopped = watched(1, roll, ended)
    stopped.at("in step 4")
    assert stopped.look() is None
    with watched(0, roll, ended) as first:
        for step in range(20):  # longer than the limit: a worker that gets further is not ended
            first.at(f"in step {step}")
            time.sleep(0.06)
        assert ended == []
        end = time.monotonic() + 10
        while not ended and time.monotonic() < end:
            time.sleep(0.02)
    assert len(ended) == 1 and "rank 0 in step 19" in ended[0]
    assert "rank 1 has given no sign of life for" in ended[0] and "last in step 4" in ended[0]
    assert roll.take() == ended


def test_a_worker_that_waits_for_another_that_gets_further_is_not_ended() -> None:
    roll, ended = Attendance(), list[str]()
    with watched(0, roll, ended) as waits, watched(1, roll, ended) as works:
        waits.at("waiting for the others")
        for shard in range(30):
            works.at(f"after extract of {shard}/30 shards")
            time.sleep(0.06)
    assert ended == []


def test_without_the_attendance_a_worker_judges_by_itself() -> None:
    class Gone(Attendance):
        def sign(self, *given) -> float:
            raise ConnectionError("no route to host")

        def describe(self, silent: float) -> str:
            raise ConnectionError("no route to host")

        def note(self, text: str) -> None:
            raise ConnectionError("no route to host")

    over, ended = threading.Event(), list[str]()

    def end(text: str) -> None:
        ended.append(text)
        over.set()

    with Watchdog(0, 2, 0.4, Gone(), end) as watchdog:
        watchdog.at("in step 9")
        assert over.wait(10)
    assert "rank 0 in step 9" in ended[0]


def test_workers_that_never_begin_end_the_run() -> None:
    class Silent:
        quiet_for = 0.0

        def quiet(self) -> float:
            return self.quiet_for

    roll, has_room = Silent(), [True]
    check = SilenceCheck(roll, 120.0, lambda: has_room[0])  # type: ignore[arg-type]

    def after(quiet: float, room: bool = True) -> None:
        check._next, roll.quiet_for, has_room[0] = 0.0, quiet, room
        check()

    check()
    roll.quiet_for = 1e9
    check()  # it was asked a moment ago
    after(119.0)
    after(500.0, room=False)  # waits for machines
    after(610.0)
    after(1.0)  # somebody got further
    after(100.0)
    with pytest.raises(RunFailedError, match="no sign of life for 122 s"):
        after(122.0)
