"""A store on another machine, over ssh: the same promises, and only to a machine that is known."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from buckets import assert_is_a_place, made
from ssh_server import ssh_machine
from toys import write_recipe

from trivium.kit.errors import TriviumError
from trivium.kit.places import place_at
from trivium.pipeline.lease import Lease
from trivium.pipeline.run import run
from trivium.pipeline.transfer import pull


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with ssh_machine(tmp_path / "home") as port:
        yield f"ssh://somebody@127.0.0.1:{port}{tmp_path / 'far'}"


def test_a_name_is_given_once_and_an_object_is_whole(url, tmp_path):
    assert_is_a_place(url)
    first, second = Lease(place_at(url), "x"), Lease(place_at(url), "x")
    assert first.take() is None
    assert second.take() is not None
    assert not list((tmp_path / "far").rglob("*.part"))


def test_requests_of_many_threads_get_their_own_answers(url):
    """A heartbeat goes out while parts are sent; on one channel each drops what the other waits for."""
    place = place_at(url)
    for number in range(4):
        place.write(f"a/{number}", str(number).encode())
    right: list[int] = []

    def ask(number: int) -> None:
        for _ in range(10):
            assert place.size(f"a/{number}") == 1
            assert place.read(f"a/{number}") == str(number).encode()
        right.append(number)

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert sorted(right) == [0, 1, 2, 3]


def test_a_connection_that_broke_is_opened_again(url):
    place = place_at(url)
    place.write("a", b"here")
    place._fs.client.get_transport().close()
    assert place.read("a") == b"here"
    assert place.read("b") is None


def test_results_go_there_and_come_back(url, tmp_path):
    path = write_recipe(tmp_path)
    run(path, tmp_path / "here", store=url)
    rows = pull(path, url, tmp_path / "there")
    assert {row[1] for row in rows[1:]} == {"pulled"}
    assert made(tmp_path / "there", "toy") == made(tmp_path / "here", "toy")


def test_a_machine_that_known_hosts_does_not_name_is_refused(url, tmp_path):
    (tmp_path / "home" / ".ssh" / "known_hosts").write_text("")
    with pytest.raises(TriviumError, match=r"cannot be used: .*not found in known_hosts") as refused:
        place_at(url.replace("somebody@", "somebody:secret@"))
    assert "ssh://somebody@127.0.0.1" in str(refused.value)
    assert "secret" not in str(refused.value)
