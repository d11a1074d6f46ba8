"""Pictures and sounds over HTTP and in the terminal, and what is never fetched."""

import base64
import http.server
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from seeing import asked, png, seeing_model, seeing_tokenizer, wav
from serving import CHAT, assert_error, client, conversation, raw, running

from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.serve import fetching
from trivium.serve.failures import RequestRefused
from trivium.serve.fetching import fetched, is_public
from trivium.serve.limits import Limits
from trivium.tokens import parts


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def seen(url, text="What is this?"):
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def heard(data):
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
    return [{"role": "user", "content": [sound, {"type": "text", "text": "What is this?"}]}]


def engine(**settings):
    return Engine(seeing_model(), seeing_tokenizer(), seed=0, **settings)


def test_the_official_client_shows_pictures_and_plays_sounds(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    reader, greedy = seeing_tokenizer(), Sampling(temperature=0, max_new_tokens=6)
    [[expected]] = engine().generate([Request(reader.encode_prompt(asked(tmp_path / "a.png")), greedy)])
    with running({"one": engine(prefix_cache_size=4)}) as address:
        ask = client(address).chat.completions.create
        for _ in range(2):
            said = ask(model="one", messages=seen(data_url(png())), temperature=0, max_tokens=6)
            assert said.choices[0].message.content == expected.text
            assert said.usage.prompt_tokens == expected.prompt_tokens
        other = ask(model="one", messages=seen(data_url(png((0, 0, 250)))), temperature=0, max_tokens=6)
        sound = ask(model="one", messages=heard(wav()), temperature=0, max_tokens=6)
        assert len({expected.text, other.choices[0].message.content, sound.choices[0].message.content}) > 1


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (seen("http://example.org/a.png"), "without --allow-fetch"),
        (seen("file:///etc/passwd"), "without --allow-fetch"),
        (seen("/etc/passwd"), "without --allow-fetch"),
        (seen("data:image/png;base64,%%%"), "no valid base64"),
        (seen("data:image/png,abc"), "not fetched"),
        (seen(data_url(b"x")), "not a picture that can be read"),
        (heard(b"x"), "no WAV file"),
        ([{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}], "cannot be read here"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:", "path": "/x"}}]}],
         "valid string"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused_in_a_sentence(messages, words):
    with running({"one": engine()}) as address, raw(address) as http_client:
        answer = http_client.post(CHAT, json={"model": "one", "messages": messages})
        assert_error(answer, 400)
        assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("169.254.169.254", False), ("192.168.0.1", False), ("172.16.9.9", False), ("100.64.0.1", False),
        ("0.0.0.0", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False),
        ("fe80::1%eth0", False), ("fc00::1", False), ("::ffff:127.0.0.1", False), ("2002:7f00:1::", False),
        ("168.63.129.16", False), ("192.0.0.192", False), ("192.88.99.1", False), ("fec0::1", False),
        ("3fff::1", False), ("64:ff9b::a83f:8110", False), ("192.0.1.1", True), ("168.63.129.17", True),
        ("64:ff9b::7f00:1", False), ("64:ff9b::808:808", True), ("ff02::1", False),
    ],
)  # fmt: skip
def test_only_public_addresses_are_reached(address, public):
    assert is_public(address) is public


class Inside(http.server.BaseHTTPRequestHandler):
    """A service that no client may reach through the server."""

    asked = 0
    location = "http://169.254.169.254/latest"

    def do_GET(self):
        Inside.asked += 1
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", self.location)
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(png() if self.path == "/a.png" else b"x" * (1 << 20))

    def log_message(self, *_):
        pass


@pytest.fixture
def inside():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Inside)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Inside.asked = 0
    yield server.server_port
    server.shutdown()
    server.server_close()


def resolving(monkeypatch, *answers):
    """Names resolve to these addresses, one look-up after the other."""
    left = list(answers)

    def look_up(host, port, *_, **__):
        # An address is itself; only names are looked up.
        literal = host.replace(".", "").isdecimal()
        address = host if literal else left.pop(0) if len(left) > 1 else left[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(fetching.socket, "getaddrinfo", look_up)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/a.png", "http://localhost/a.png", "http://[::1]/a.png", "http://2130706433/a.png",
     "http://0x7f.1/a.png", "http://169.254.169.254/latest/meta-data", "ftp://example.org/a", "gopher://x",
     "http://user:pass@example.org/", "http://example.org:22/", "http:///a.png", "https://"],
)  # fmt: skip
def test_private_addresses_and_other_schemes_are_refused(url):
    with pytest.raises(RequestRefused, match="a picture's URL"):
        fetched(url)


def test_a_redirect_into_the_inside_is_refused(monkeypatch, inside):
    public = "http://pictures.example/away"
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(fetching, "_PORTS", {"http": inside})
    resolving(monkeypatch, "127.0.0.1", "169.254.169.254")
    with pytest.raises(RequestRefused, match="not public"):
        fetched(public)
    assert Inside.asked == 1


def test_a_name_that_changes_its_address_is_reached_where_it_was_checked(monkeypatch, inside):
    resolving(monkeypatch, "93.184.216.34", "127.0.0.1")
    reached = []

    def connect(address, timeout):
        reached.append(address[0])
        raise OSError("stop here")

    monkeypatch.setattr(fetching.socket, "create_connection", connect)
    with pytest.raises(RequestRefused, match="cannot be fetched"):
        fetched("http://pictures.example/a.png")
    assert reached == ["93.184.216.34"]


def test_a_public_picture_is_fetched_within_its_bounds(monkeypatch, inside):
    resolving(monkeypatch, "127.0.0.1")
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    monkeypatch.setattr(fetching, "_PORTS", {"http": inside})
    assert fetched("http://pictures.example/a.png") == png()
    monkeypatch.setattr(fetching, "MOST_BYTES", 1000)
    with pytest.raises(RequestRefused, match="more than 1,000 bytes"):
        fetched("http://pictures.example/large")
    monkeypatch.setattr(Inside, "location", "http://pictures.example/away")
    with pytest.raises(RequestRefused, match="leads on more than 3 times"):
        fetched("http://pictures.example/away")
    with running({"one": engine()}, limits=Limits(allow_fetch=True)) as address:
        said = client(address).chat.completions.create(
            model="one", messages=seen("http://pictures.example/a.png"), max_tokens=3
        )
        assert said.usage.completion_tokens >= 1


class Dripping(http.server.BaseHTTPRequestHandler):
    """Sends a byte of its head now and then, and no body."""

    def do_GET(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        with suppress(OSError):
            for _ in range(20):
                time.sleep(0.05)
                self.wfile.write(b"x")
            self.wfile.write(b"\r\n\r\n")

    def log_message(self, *_):
        pass


def test_a_server_that_drips_is_cut_off(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    resolving(monkeypatch, "127.0.0.1")
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    monkeypatch.setattr(fetching, "_PORTS", {"http": server.server_port})
    with pytest.raises(RequestRefused, match="takes too long"):
        fetched("http://pictures.example/a.png", seconds=0.2)
    server.shutdown()
    server.server_close()


def test_pictures_that_are_fetched_hold_up_nothing_else_and_are_few(monkeypatch):
    arrived, slow = threading.Semaphore(0), threading.Event()

    def wait(*_, **__):
        arrived.release()
        slow.wait(20)
        raise RequestRefused("stop here")

    monkeypatch.setattr(fetching, "fetched", wait)
    limits = Limits(allow_fetch=True, fetched_pictures=2)
    with running({"one": engine()}, limits=limits) as address, raw(address) as http_client:
        url = {"type": "image_url", "image_url": {"url": "http://pictures.example/a.png"}}
        bodies = [{"model": "one", "messages": [{"role": "user", "content": [url]}]}] * 5
        with ThreadPoolExecutor(5) as clients:
            waiting = [clients.submit(http_client.post, CHAT, json=body, timeout=20) for body in bodies]
            for _ in bodies:
                assert arrived.acquire(timeout=10)
            plain = {"model": "one", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
            assert http_client.post(CHAT, json=plain, timeout=10).status_code == 200
            slow.set()
            assert [one.result().status_code for one in waiting] == [400] * 5
        more = [{**url, "image_url": {"url": f"http://pictures.example/{index}.png"}} for index in range(3)]
        body = {"model": "one", "messages": [{"role": "user", "content": more}]}
        assert "at most 2 are fetched" in http_client.post(CHAT, json=body).json()["error"]["message"]


def test_pictures_are_bounded_before_they_are_decoded_and_decoded_once(monkeypatch):
    decoded = []
    whole = parts.picture_item
    monkeypatch.setattr(parts, "picture_item", lambda *how: decoded.append(1) or whole(*how))
    small, large = data_url(png()), data_url(png(size=(1000, 800)))

    def turns(*urls):
        for url in urls:
            yield from seen(url)
            yield {"role": "assistant", "content": "a"}

    def sent(*urls, **how):
        decoded.clear()
        messages = [*turns(*urls), {"role": "user", "content": "b"}]
        return http_client.post(CHAT, json={"model": "one", "messages": messages, "max_tokens": 1, **how})

    limits = Limits(picture_pixels=900_000, request_pixels=2_000_000)
    with running({"one": engine()}, limits=limits) as address, raw(address) as http_client:
        context = 4 * 200
        answer = sent(*[small] * 400)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert len(decoded) <= context // 4
        assert sent(*[small] * 400, overflow="drop").status_code == 200
        assert len(decoded) <= context // 4
        assert "one request may hold" in sent(large, large, large).json()["error"]["message"]
        assert len(decoded) == 2
        too_large = sent(data_url(png(size=(1000, 1000))))
        assert "more than 900,000" in too_large.json()["error"]["message"]


def test_the_terminal_shows_a_file(tmp_path):
    (tmp_path / "a b.png").write_bytes(png())
    (tmp_path / "c.wav").write_bytes(wav())
    talk, out = conversation(("one", engine()))
    talk.hear(f'/show "{tmp_path / "a b.png"}" What is this?')
    talk.hear(f"/show {tmp_path / 'c.wav'}")
    [first, _, second, _] = talk.speakers[0].messages
    assert [part["type"] for part in first["content"]] == ["image", "text"]
    assert [part["type"] for part in second["content"]] == ["audio"]
    talk.hear("/show nowhere.png")
    talk.hear("/show")
    assert "cannot be read" in out.getvalue()
    assert "name a file" in out.getvalue()
    assert len(talk.speakers[0].messages) == 4
