"""The first signal asks, the second does not wait."""

import os
import signal
import threading
import time

import pytest

from sst.errors import Terminated, exit_on_user_error, terminable
from sst.run.interrupt import FailureNote, StopFlag, run_stoppably


def later(seconds: float, number: int) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_work_ends_in_order_after_a_signal(tmp_path, number, raised, capsys):
    stop, saved = StopFlag(str(tmp_path)), []

    def work():
        deadline = time.monotonic() + 20
        while not stop.is_up() and time.monotonic() < deadline:
            time.sleep(0.02)
        saved.append(stop.is_up())

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    later(0.2, number)
    with pytest.raises(raised):
        run_stoppably(work, stop)
    assert saved == [True]
    assert "again stops at once" in capsys.readouterr().out
    assert not stop.is_up()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_second_signal_does_not_wait(tmp_path):
    release = threading.Event()
    later(0.1, signal.SIGINT)
    later(0.4, signal.SIGINT)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_stoppably(lambda: release.wait(30), StopFlag(str(tmp_path)))
    assert time.monotonic() - started < 10
    release.set()


def test_errors_of_the_work_come_out(tmp_path):
    def fail():
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        run_stoppably(fail, StopFlag(str(tmp_path)))


def test_a_flag_of_before_stops_nothing(tmp_path):
    stop, seen = StopFlag(str(tmp_path)), []
    stop.put_up()
    run_stoppably(lambda: seen.append(stop.is_up()), stop)
    assert seen == [False]


def test_sigterm_ends_with_its_own_code(capsys):
    before = signal.getsignal(signal.SIGTERM)  # Ray, where a test started it in this process, has its own
    with pytest.raises(SystemExit) as ended, exit_on_user_error(), terminable():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


class Remote(Exception):
    """An error as Ray hands it on: the text is a traceback, the cause is what was raised."""

    cause = ValueError("no image has 5 labels")


def test_a_worker_leaves_its_error_until_the_run_has_ended_for_it(tmp_path):
    note = FailureNote(str(tmp_path))
    assert note.read() is None and note.take() is None
    for error in (ValueError("no image has 5 labels"), Remote("Traceback (most recent call last)")):
        note.write(error)
        assert note.read() == note.take() == "no image has 5 labels"
        assert note.read() is None and not list(tmp_path.iterdir())
