"""`trivium export`: what other programs open, and what the hub is sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from gguf_files import folder_of, tokenizer

from trivium.cli import cli
from trivium.kit.errors import TriviumError
from trivium.model.adapters import save_adapter
from trivium.model.attention import Documents
from trivium.model.folder import load_model, save_model
from trivium.model.lora import AdapterSettings, add_adapter, merged
from trivium.pipeline.export import modelfile


def said(*words: str) -> str:
    done = CliRunner().invoke(cli, ["export", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_gguf_with_a_modelfile(tmp_path: Path) -> None:
    folder_of("qwen3", tmp_path / "model")
    out = tmp_path / "out" / "m.gguf"
    assert "a Modelfile beside it" in said(
        str(tmp_path / "model"), "--to", "gguf", "--type", "q8_0", "--out", str(out)
    )
    assert out.read_bytes()[:4] == b"GGUF"
    lines = (out.parent / "Modelfile").read_text().splitlines()
    assert lines[:2] == ["FROM ./m.gguf", "PARAMETER num_ctx 128"]
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert 'PARAMETER stop "<|endoftext|>"' in lines
    assert 'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}' in lines


def test_a_template_that_is_not_chatml_is_left_to_ollama(tmp_path: Path) -> None:
    folder_of("llama", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    )
    assert "TEMPLATE" not in modelfile(tmp_path, "m.gguf")


def adapted(folder: Path, base: Path) -> torch.Tensor:
    """An adapter to `base` below `folder`, merged weights in it; what the merged model computes."""
    model = load_model(base)
    add_adapter(model, AdapterSettings(rank=4), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05, generator=generator)
    with merged(model):
        save_model(model, folder)
        tokens = torch.arange(12)
        logits = model.logits(model(tokens, Documents([12])))
    save_adapter(model, folder / "adapter", base=str(base))
    tokenizer().save(folder)
    return logits.detach()


def test_peft_opens_the_adapter_and_transformers_the_merged_folder(tmp_path: Path) -> None:
    folder_of("llama", tmp_path / "base")
    logits = adapted(tmp_path / "stage", tmp_path / "base")
    assert str(tmp_path / "base") in said(
        str(tmp_path / "stage"), "--to", "peft", "--out", str(tmp_path / "adapter")
    )
    said(str(tmp_path / "stage"), "--to", "hf", "--out", str(tmp_path / "whole"))
    said(str(tmp_path / "stage"), "--to", "mlx", "--out", str(tmp_path / "mlx"))
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "mlx" / path.name).read_bytes()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits[0], logits, atol=5e-5, rtol=0)
        torch.testing.assert_close(whole(ids).logits[0], logits, atol=5e-5, rtol=0)
    with pytest.raises(TriviumError, match="not empty"):
        said(str(tmp_path / "stage"), "--to", "hf", "--out", str(tmp_path / "whole"))
    with pytest.raises(TriviumError, match=r"holds no adapter: train with `adapter:"):
        said(str(tmp_path / "base"), "--to", "peft", "--out", str(tmp_path / "none"))


class Hub:
    """As much of the hub as takes a commit of files that are sent whole."""

    def __init__(self) -> None:
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    self.answer({"url": f"{hub.url}/me/tiny"})
                elif self.path == "/api/validate-yaml":
                    self.answer({"errors": [], "warnings": []})
                elif "/preupload/" in self.path:
                    files = [
                        {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for one in json.loads(body)["files"]
                    ]
                    self.answer({"files": files})
                elif "/commit/" in self.path:
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            value = line["value"]
                            hub.files[value["path"]] = base64.b64decode(value["content"])
                    self.answer(
                        {"commitUrl": f"{hub.url}/me/tiny/commit/1", "commitOid": "1", "success": True}
                    )
                else:
                    self.answer({}, 404)

            def do_GET(self) -> None:
                self.answer({"sha": "0", "siblings": [], "id": "me/tiny"})

            def answer(self, content: dict, status: int = 200) -> None:
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *arguments: object) -> None:
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub

    one = Hub()
    whole = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: whole(endpoint=one.url, token="hf_test"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield one
    one.server.shutdown()


def test_the_hub_gets_the_files_and_a_card_with_a_licence(tmp_path: Path, hub: Hub) -> None:
    folder_of("llama", tmp_path / "model")
    words = (str(tmp_path / "model"), "--to", "hub", "--out", "me/tiny")
    with pytest.raises(TriviumError, match="needs a licence"):
        said(*words)
    dry = said(*words, "--licence", "apache-2.0", "--dry-run")
    assert "would send model.safetensors" in dry
    assert "license: apache-2.0" in dry
    assert not hub.created
    assert not hub.files
    assert "Sent to" in said(*words, "--licence", "apache-2.0", "--private")
    assert hub.created[0]["name"] == "tiny"
    assert "private" in json.dumps(hub.created[0])
    assert hub.files["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "license: apache-2.0" in card
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= hub.files.keys()


def test_a_place_that_is_no_repository_is_refused(tmp_path: Path) -> None:
    folder_of("llama", tmp_path / "model")
    with pytest.raises(TriviumError, match="write owner/name"):
        said(str(tmp_path / "model"), "--to", "hub", "--out", "tiny", "--licence", "mit")
