"""A server killed while it streams: its clients hear of it, it starts again, its files are as before."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from forked import copied
from generating import tiny_model, tokenizer
from serving import CHAT, HELLO, raw

from trivium.model.folder import save_model
from trivium.serve.server import serve

ENDLESS = {
    "model": "tiny",
    "messages": HELLO,
    "stream": True,
    "max_tokens": 2000,
    "min_tokens": 2000,
    "seed": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("killed") / "tiny"
    save_model(tiny_model(context=4096), place)
    tokenizer().save(place)
    return place


def started(folder: Path, port: int = 0) -> tuple[subprocess.Popen[str], str]:
    process = copied(
        lambda: serve([f"tiny={folder}"], port=port),
        env={**os.environ, "TRIVIUM_API_KEY": ""}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("Serving"))
    return process, line.partition(" at ")[2].partition(" ")[0]


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """What lies in a folder, and when it was changed."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_until_the_end(http: httpx.Client, strike) -> tuple[list[str], Exception | None]:
    """The lines of a stream, in the middle of which something happens, and the error that it ends with."""
    lines: list[str] = []
    try:
        with http.stream("POST", CHAT, json=ENDLESS) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                if len(lines) == 6:
                    strike()
    except httpx.HTTPError as error:
        return lines, error
    return lines, None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_clients_hear_of_it_and_a_new_server_takes_over(folder: Path, number: signal.Signals) -> None:
    before = contents(folder)
    process, address = started(folder)
    try:
        with raw(address) as http, socket.create_connection(address[7:].split(":")) as half:
            half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
            half.settimeout(20)
            whole = http.post(CHAT, json={**ENDLESS, "stream": False}).json()["choices"][0]["message"][
                "content"
            ]
            lines, error = read_until_the_end(http, lambda: process.send_signal(number))
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            told = "".join(one["choices"][0]["delta"].get("content", "") for one in events)
            if number == signal.SIGKILL:
                assert error is not None, "the client takes half an answer for a whole one"
                assert "data: [DONE]" not in lines
                assert whole.startswith(told)
                assert told != whole
            else:
                assert error is None, error
                assert lines[-2] == "data: [DONE]"
                assert told == whole
            with suppress(ConnectionResetError):
                assert len(half.recv(1000)) < 1000
        assert process.wait(20) == (-number if number == signal.SIGKILL else 0)
        assert contents(folder) == before
        # on the same port at once, though connections of the one before may still linger
        process, again = started(folder, int(address.rpartition(":")[2]))
        assert again == address
        with raw(again) as http:
            lines, error = read_until_the_end(http, lambda: None)
            assert error is None
            assert lines[-2] == "data: [DONE]"
            answer = http.post(CHAT, json={**ENDLESS, "stream": False}).json()
            assert answer["choices"][0]["message"]["content"] == whole
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_what_compiles_forms_ends_with_the_server_that_was_killed(folder: Path) -> None:
    """The process beside it holds no port and no memory for ever."""
    process, address = started(folder)
    try:
        with raw(address) as http:
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 4, "regex": "[ab]{4}"}
            assert http.post(CHAT, json=body).status_code == 200
        children = [
            int(one) for one in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            children += [int(one) for one in (task / "children").read_text().split()]
        assert children
        process.kill()
        process.wait()
        deadline = 200
        while any(Path(f"/proc/{child}").exists() and not is_zombie(child) for child in children):
            deadline -= 1
            assert deadline, "a process of the killed server is left"
            signal.sigtimedwait([], 0.05)
    finally:
        process.kill()
        process.wait()


def is_zombie(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
