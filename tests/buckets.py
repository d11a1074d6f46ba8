"""An object store on this machine, and machines with separate disks that share it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import s3fs

from trivium.kit.places import place_at
from trivium.kit.seals import read_seal
from trivium.pipeline.store import Store

# One request after the other, as S3 itself decides between two conditional writes of one name.
SERVER = """\
import sys
from werkzeug.serving import make_server
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
server = make_server(sys.argv[1], 0, DomainDispatcherApplication(create_backend_app), threaded=False)
print(server.port, flush=True)
server.serve_forever()
"""


@contextmanager
def object_store(host: str = "127.0.0.1") -> Iterator[dict[str, str]]:
    """A server on loopback, as the environment that leads s3fs to it."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, host], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "anybody",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.kill()
        server.wait()


def new_bucket(environment: dict[str, str], patch: pytest.MonkeyPatch) -> str:
    """The address of an empty bucket."""
    for name, value in environment.items():
        patch.setenv(name, value)
    name = f"lab-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/trivium"


def assert_is_a_place(url: str) -> None:
    """A name is given once, and what is listed is whole."""
    place = place_at(url)
    assert place.read("a/one") is None
    assert place.size("a/one") is None
    assert place.names("a") == []
    assert place.create("a/one", b"first")
    assert not place.create("a/one", b"second")
    assert place.read("a/one") == b"first"
    place.write("a/one", b"longer than it was")
    assert place.size("a/one") == 18
    assert place.names("a") == ["one"]
    place.write("a/two", b"")
    assert place.names("a") == ["one", "two"]
    place.remove("a/one")
    place.remove("a/one")
    assert place.names("a") == ["two"]


def assert_one_creates(url: str) -> None:
    """Of many that create one name, one succeeds, and its content is there."""
    places = [place_at(url) for _ in range(4)]
    start, won = threading.Barrier(4), []

    def create(number: int) -> None:
        for turn in range(5):
            start.wait()
            if places[number].create(f"turn/{turn}", str(number).encode()):
                won.append((turn, number))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(turn for turn, _ in won) == list(range(5))
    assert all(places[0].read(f"turn/{turn}") == str(number).encode() for turn, number in won)


def until(condition: object, seconds: float = 60.0) -> None:
    """Wait for something that another process brings about."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def made(runs: Path, recipe: str) -> dict[str, str]:
    """What every stage of a recipe came to: the checksum of its result."""
    return {
        stage: read_seal(entry.folder)["result"] for stage, entry in Store(runs).recipes()[recipe].items()
    }
