"""Two processes never work on one run; a dead owner's lock is no hindrance."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster import storage
from sst.errors import Terminated, UserError, terminable
from sst.run import lock
from sst.run.lock import LockRecord, RunLock

HOLD = """
import sys, time
from sst.run.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_live_run_is_refused_by_process_and_host(holder, tmp_path):
    with pytest.raises(UserError, match=rf"worked on by process {holder.pid} on .*--name"), RunLock(str(tmp_path)):
        pass
    assert json.loads((tmp_path / "lock.json").read_text())["process"] == holder.pid


def test_a_killed_owner_is_followed_at_once(holder, tmp_path):
    holder.kill()
    holder.wait()
    started = time.monotonic()
    with RunLock(str(tmp_path)) as mine:
        assert json.loads((tmp_path / "lock.json").read_text())["owner"] == mine.record.owner
    assert time.monotonic() - started < lock.STALE_SECONDS / 2
    assert not list(tmp_path.iterdir())


def test_the_lock_is_gone_after_an_error(tmp_path):
    with pytest.raises(KeyError), RunLock(str(tmp_path)):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_reused_process_number_is_not_the_owner():
    mine = LockRecord.mine()
    assert not mine.is_dead()
    assert mine.model_copy(update={"born": mine.born - 5}).is_dead()
    assert not mine.model_copy(update={"machine": "elsewhere", "born": 0.0}).is_dead()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.1)


def of_another_machine(url: str, beat: int) -> None:
    record = LockRecord.mine().model_copy(update={"machine": "elsewhere", "owner": "other", "beat": beat})
    storage.write_bytes(f"{url}/lock.json", record.model_dump_json().encode())


def test_an_owner_elsewhere_is_followed_when_it_gives_no_sign_of_life(impatient, tmp_path, capsys):
    of_another_machine(str(tmp_path), 3)
    with RunLock(str(tmp_path)) as mine:
        assert json.loads((tmp_path / "lock.json").read_text())["owner"] == mine.record.owner
    assert "waiting 1 s for a sign of life" in capsys.readouterr().out


def test_an_owner_elsewhere_that_lives_is_refused(impatient, tmp_path):
    of_another_machine(str(tmp_path), 3)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: (time.sleep(0.4), of_another_machine(str(tmp_path), 4)))
        with pytest.raises(UserError, match="worked on by"), RunLock(str(tmp_path)):
            pass
    assert json.loads((tmp_path / "lock.json").read_text())["beat"] == 4


def test_signs_of_life_are_given(impatient, tmp_path):
    with RunLock(str(tmp_path)):
        time.sleep(0.5)
        assert json.loads((tmp_path / "lock.json").read_text())["beat"] >= 2


def test_an_owner_that_was_overtaken_stops(impatient, tmp_path):
    mine = RunLock(str(tmp_path))
    with pytest.raises(Terminated), terminable(), mine:
        for beat in range(100):  # as the other one does, which may fall between this one's look and its own beat
            of_another_machine(str(tmp_path), beat)
            time.sleep(0.05)
    assert mine.lost
    assert json.loads((tmp_path / "lock.json").read_text())["owner"] == "other"


def test_a_torn_lock_protects_nobody(tmp_path):
    (tmp_path / "lock.json").write_text('{"owner": "x"')
    with RunLock(str(tmp_path)):
        pass


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_of_many_that_create_a_file_one_succeeds(tmp_path, scheme):
    url = f"{scheme}{tmp_path}/once"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.create_bytes(url, str(i).encode()), range(32)))
    assert sum(won) == 1
    assert storage.read_bytes(url) == str(won.index(True)).encode()
