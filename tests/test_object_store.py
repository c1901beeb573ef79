"""Corpus and run on an S3-compatible store: no file of theirs on any disk."""

import threading
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from cluster import storage
from sst.lock import RunHeldError, RunLock
from tests.small import SETTINGS, files, local_tools, train_locally, write_toy


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


def test_a_run_on_the_store_gives_the_bytes_of_one_on_disk(bucket, tmp_path):
    write_toy(str(tmp_path / "shards"), train=36, test=12)
    write_toy(f"{bucket}/small/shards", train=36, test=12)
    train_locally(str(tmp_path / "shards"), str(tmp_path / "run"), local_tools([]))
    train_locally(f"{bucket}/small/shards", f"{bucket}/small/run", local_tools([]))
    assert all_objects(f"{bucket}/small/shards") == files(tmp_path / "shards")
    here, there = files(tmp_path / "run"), all_objects(f"{bucket}/small/run")
    assert here.keys() == there.keys()
    same = [name for name in here if name.endswith((".safetensors", ".npz"))]
    assert len(same) > 10 and all(here[name] == there[name] for name in same)
    assert SETTINGS.stage1.rounds == 2
