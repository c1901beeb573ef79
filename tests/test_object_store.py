"""Corpus and run on an S3-compatible store: no file of theirs on any disk."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
import s3fs
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from cluster import storage
from sst.run.lock import RunHeldError, RunLock
from tests.proxy import Proxy
from tests.small import files, local_tools, train_locally, write_toy


@pytest.fixture(scope="module")
def bucket():
    """URL of an empty bucket; the variables by which every process finds its store are set meanwhile."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="corpus")
        yield "s3://corpus"
    server.stop()


@pytest.fixture
def cut_connections(bucket, monkeypatch):
    """A bucket behind a proxy that again and again cuts all connections, and refuses new ones for a moment."""
    proxy, stop = Proxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])), threading.Event()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.1)
    s3fs.S3FileSystem.clear_instance_cache()
    cuts = []

    def cut() -> None:
        while not stop.wait(0.7):
            proxy.cut()
            cuts.append(proxy.taken)
            stop.wait(0.2)
            proxy.up = True

    thread = threading.Thread(target=cut, daemon=True)
    thread.start()
    yield bucket, cuts
    stop.set()
    thread.join()
    proxy.close()
    s3fs.S3FileSystem.clear_instance_cache()


def all_objects(url: str) -> dict[str, bytes]:
    fs, path = storage.filesystem(url)
    return {name.removeprefix(path + "/"): fs.cat_file(name) for name in fs.find(path)}


def test_what_another_process_writes_is_seen_at_once(bucket):
    """fsspec remembers listings, in which a file of a moment ago would be missing."""
    folder = f"{bucket}/seen"
    storage.write_bytes(f"{folder}/a", b"1")
    assert storage.list_names(folder) == ["a"] and not storage.exists(f"{folder}/b")
    boto3.client("s3").put_object(Bucket="corpus", Key="seen/b", Body=b"2")
    assert storage.exists(f"{folder}/b") and storage.list_names(folder) == ["a", "b"]
    assert storage.read_bytes(f"{folder}/b") == b"2"
    storage.remove(folder)
    assert storage.list_names(folder) == [] and not storage.exists(folder)


def test_of_many_creators_of_an_object_one_succeeds(bucket):
    start = threading.Barrier(8)

    def create(number: int) -> bool:
        start.wait()
        return storage.create_bytes(f"{bucket}/created", bytes([number]))

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(f"{bucket}/created") == bytes([won.index(True)])


def test_a_run_on_the_store_is_locked(bucket):
    with RunLock(f"{bucket}/locked"), pytest.raises(RunHeldError):
        RunLock(f"{bucket}/locked").__enter__()
    assert not storage.exists(f"{bucket}/locked/lock.json")


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Corpus and run, file by file, as they are on a disk."""
    folder = tmp_path_factory.mktemp("disk")
    write_toy(str(folder / "shards"), train=36, test=12)
    train_locally(str(folder / "shards"), str(folder / "run"), local_tools([]))
    return files(folder / "shards"), files(folder / "run")


def run_on_store(folder: str, shards: dict[str, bytes], run: dict[str, bytes]) -> None:
    write_toy(f"{folder}/shards", train=36, test=12)
    train_locally(f"{folder}/shards", f"{folder}/run", local_tools([]))
    assert all_objects(f"{folder}/shards") == shards
    found = all_objects(f"{folder}/run")
    assert found.keys() == run.keys()
    same = [name for name in run if name.endswith((".safetensors", ".npz"))]
    assert len(same) > 10 and all(run[name] == found[name] for name in same)


def test_a_run_on_the_store_gives_the_bytes_of_one_on_disk(bucket, on_disk):
    run_on_store(f"{bucket}/calm", *on_disk)


def test_connections_that_are_cut_cost_nothing_of_a_run(cut_connections, on_disk):
    bucket, cuts = cut_connections
    run_on_store(f"{bucket}/cut", *on_disk)
    assert len(cuts) > 5 and cuts[-1] > cuts[0]
