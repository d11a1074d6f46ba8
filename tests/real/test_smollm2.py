"""SmolLM2-135M-Instruct, opened without an edit: transformers, PEFT and llama.cpp are the referees."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
import transformers
from ports import free_port

import trivium
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.model.adapters import load_adapter, save_adapter
from trivium.model.attention import Documents
from trivium.model.gguf.write import write_gguf
from trivium.model.lora import AdapterSettings, add_adapter, bake

pytestmark = pytest.mark.real
PLACE = Path(os.environ["TRIVIUM_REAL"]).expanduser()
GGUF, FOLDER, LLAMA = PLACE / "smollm2.gguf", PLACE / "smollm2", PLACE / "llama"
QUESTIONS = [
    "What is the capital of France?", "Name three primary colours.", "Write a haiku about rain.",
    "What is 12 + 30?", "Who wrote Hamlet?", "Explain photosynthesis in one sentence.", "What is a noun?",
    "Give me a recipe for pancakes.", "Translate 'good morning' into Spanish.", "Why is the sky blue?",
    "List two even numbers.", "What is the boiling point of water?", "Tell me a joke.",
    "Write a short letter to a friend.", "What does HTML stand for?", "How many days has a week?",
    "What is the opposite of hot?", "Name a planet.", "Define gravity.", "What is Python used for?",
]  # fmt: skip


@cache
def ours() -> trivium.Model:
    return trivium.load(FOLDER, dtype=torch.float32)


@cache
def theirs() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@cache
def their_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


def long_text() -> str:
    """A text that is there on every machine, or the one that TRIVIUM_REAL_TEXT names."""
    named = os.environ.get("TRIVIUM_REAL_TEXT")
    pages = [Path(named)] if named else sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


def conversations() -> list[list[dict[str, str]]]:
    """20 of one to five turns, with and without a system message, and with text that looks like control."""
    found: list[list[dict[str, str]]] = []
    for index, question in enumerate(QUESTIONS):
        turns: list[dict[str, str]] = []
        if index % 3 == 0:
            turns.append({"role": "system", "content": f"Answer briefly. {index}"})
        for turn in range(index % 3 + 1):
            turns.append({"role": "user", "content": f"{question} ({turn})\n"})
            turns.append({"role": "assistant", "content": f" The answer is {turn}. "})
        found.append(turns[:-1] if index % 2 else turns)
    return found


def test_logits_are_transformers() -> None:
    """Float32 itself moves scores of up to 39: both are measured against float64, on average and at worst.

    The worst of some 30 million scores depends on the text, for either by a factor of ten.
    """
    ids = ours().tokenizer.encode(long_text()[:3000])
    exact = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float64).eval()
    with torch.no_grad():
        truth = exact(torch.tensor([ids])).logits[0]
        expected = theirs()(torch.tensor([ids])).logits[0]
    off, their_off = ((logits - truth).abs() for logits in (ours().logits(ids), expected))
    assert float(off.mean()) < 1.15 * float(their_off.mean()) < 1.15e-5
    assert float(off.max()) < max(5e-5, 3 * float(their_off.max()))


def test_the_template_writes_the_same_bytes() -> None:
    for conversation in conversations():
        for prompting in (False, True):
            expected = their_tokenizer().apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=prompting
            )
            found = ours().tokenizer.render_chat(conversation, add_generation_prompt=prompting)
            assert found.encode() == expected.encode()
            ids = their_tokenizer()(expected, add_special_tokens=False)["input_ids"]
            assert ours().tokenizer.encode_prompt(conversation, add_generation_prompt=prompting) == ids


def test_greedy_answers_are_transformers() -> None:
    prompts = [ours().tokenizer.encode_prompt([{"role": "user", "content": one}]) for one in QUESTIONS]
    sampling = Sampling(temperature=0, max_new_tokens=64)
    answers = ours().engine.generate([Request(prompt, sampling) for prompt in prompts])
    for prompt, [answer] in zip(prompts, answers, strict=True):
        expected = theirs().generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=64, repetition_penalty=1.0,
            eos_token_id=sorted(ours().tokenizer.stop_ids), pad_token_id=2,
        )[0, len(prompt) :].tolist()  # fmt: skip
        stops = ours().tokenizer.stop_ids
        written, wanted = (
            [one for one in tokens if one not in stops] for tokens in (answer.tokens, expected)
        )
        if written != wanted:
            # Kernels of another processor may decide between two scores that are equal but for rounding.
            place = next(n for n, pair in enumerate(zip(written, wanted)) if pair[0] != pair[1])
            with torch.no_grad():
                scores = theirs()(torch.tensor([[*prompt, *wanted[:place]]])).logits[0, -1]
            best, next_best = scores.topk(2).values
            assert float(best - next_best) < 1e-3, (written, wanted)


def test_perplexity_is_transformers() -> None:
    ids = ours().tokenizer.encode(long_text())[: 512 * 16]
    rows = torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)
    sums = {"ours": 0.0, "theirs": 0.0}
    with torch.no_grad():
        for row in rows:
            for name, logits in (
                ("ours", ours().logits(row.tolist())), ("theirs", theirs()(row[None]).logits[0]),
            ):  # fmt: skip
                loss = torch.nn.functional.cross_entropy(logits[:-1].float(), row[1:], reduction="sum")
                sums[name] += float(loss)
    found = {name: math.exp(total / (511 * len(rows))) for name, total in sums.items()}
    print(found)
    # More than four digits, and no knife's edge between two of them.
    assert found["ours"] == pytest.approx(found["theirs"], rel=1e-5)


def test_the_file_gives_the_tensors_that_transformers_reads() -> None:
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        PLACE, gguf_file=GGUF.name, dtype=torch.float32
    )
    read = trivium.load(GGUF)
    folder = transformers.AutoModelForCausalLM.from_pretrained(read.folder, dtype=torch.float32)
    for name, weight in expected.state_dict().items():
        assert torch.equal(folder.state_dict()[name], weight), name
    answer = read.generate([{"role": "user", "content": QUESTIONS[0]}], temperature=0, max_new_tokens=16)
    assert "Paris" in answer.text


def llama_cpp(file: Path, prompts: list[list[int]], new_tokens: int) -> list[list[list[Any]]]:
    """For every prompt and place the two likeliest tokens with their log-probabilities."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("llama_worker.py")), str(file)],
        input=json.dumps({"prompts": prompts, "new_tokens": new_tokens}),
        env=os.environ | {"PYTHONPATH": str(LLAMA)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_llama_cpp_writes_the_same_tokens(kind: str, tmp_path: Path) -> None:
    write_gguf(FOLDER, tmp_path / "model.gguf", kind)  # type: ignore[arg-type]
    same_tokens(tmp_path / "model.gguf")


def same_tokens(file: Path) -> None:
    """llama.cpp's greedy tokens are ours of the same file, but where its two best are all but equal."""
    read = trivium.load(file)
    stops = read.tokenizer.stop_ids
    prompts = [read.tokenizer.encode_prompt([{"role": "user", "content": one}]) for one in QUESTIONS[:6]]
    for prompt, places in zip(prompts, llama_cpp(file, prompts, 40), strict=True):
        written = [best[0] for best, _ in places]
        logprobs = read.logits([*prompt, *written]).log_softmax(-1)[len(prompt) - 1 : -1]
        ended = {written[-1], int(read.logits([*prompt, *written])[-1].argmax())}
        assert len(written) == 40 or ended & stops
        # llama.cpp computes with rows in half or 8-bit precision: two scores may move towards each other.
        apart = [
            abs(float(logprobs[place, best]) - likely) for place, ((best, likely), _) in enumerate(places)
        ]
        assert sum(apart) / len(apart) < 0.2
        for place, ((best, likely), (_, next_likely)) in enumerate(places):
            if likely - next_likely > 1.0:
                assert int(logprobs[place].argmax()) == best


def test_an_adapter_goes_to_peft_and_comes_back(tmp_path: Path) -> None:
    model = trivium.load(FOLDER, dtype=torch.float32).transformer
    add_adapter(model, AdapterSettings(rank=8), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02, generator=generator)
    ids = torch.tensor(ours().tokenizer.encode(long_text()[:600]))
    save_adapter(model, tmp_path / "ours", base=str(FOLDER))
    base = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        mine = model.logits(model(ids, Documents([len(ids)])))
        torch.testing.assert_close(adapted(ids[None]).logits[0], mine, atol=1e-4, rtol=0)
    adapted.save_pretrained(tmp_path / "theirs")
    again = trivium.load(FOLDER, dtype=torch.float32).transformer
    load_adapter(again, tmp_path / "theirs")
    bake(again)
    with torch.no_grad():
        torch.testing.assert_close(again.logits(again(ids, Documents([len(ids)]))), mine, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True,
         "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    ],
    ids=["plain", "patterns", "whole parts"],
)  # fmt: skip
def test_an_adapter_that_peft_made_is_served(options: dict[str, Any], tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    made = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad:
                scale = 0.03 if "lora_" in name else 0.01
                parameter.copy_(scale * torch.randn(parameter.shape) + (0 if "lora_" in name else parameter))
    made.save_pretrained(str(tmp_path / "adapter"))
    base = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.tensor(ours().tokenizer.encode(long_text()[:600]))
    model = trivium.load(tmp_path / "adapter", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    # Rounding alone moves the worst score by some 2e-4, for transformers too; a wrong part by more than 1.
    torch.testing.assert_close(model.logits(ids.tolist()), expected, atol=5e-4, rtol=0)
    assert (expected - ours().logits(ids.tolist())).abs().max() > 1
    chats = [[{"role": "user", "content": one}] for one in QUESTIONS[:4]]
    wanted = []
    for chat in chats:
        prompt = torch.tensor([ours().tokenizer.encode_prompt(chat)])
        written = theirs.generate(
            input_ids=prompt, do_sample=False, max_new_tokens=24, repetition_penalty=1.0,
            eos_token_id=sorted(ours().tokenizer.stop_ids), pad_token_id=2,
        )[0, prompt.shape[1] :]  # fmt: skip
        wanted.append(their_tokenizer().decode(written, skip_special_tokens=True))
    place = ["alone=" + str(tmp_path / "adapter")]
    if "modules_to_save" not in options:
        place += [f"base={FOLDER}", f"base:made={tmp_path / 'adapter'}"]
    with served(place) as address:
        for name in ("alone", "base:made")[: 1 if len(place) == 1 else 2]:
            for chat, text in zip(chats, wanted, strict=True):
                body = {"model": name, "messages": chat, "max_tokens": 24, "temperature": 0}
                answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300).json()
                assert answer["choices"][0]["message"]["content"].strip() == text.strip(), name


@contextmanager
def served(models: list[str]) -> Iterator[str]:
    """`trivium serve` in a process of its own."""
    port = free_port()
    words = ["-m", "trivium.cli", "serve", *models, "--port", str(port)]
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with suppress(httpx.TransportError):
                if httpx.get(f"{address}/v1/models").is_success:
                    break
            assert server.poll() is None
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait()
