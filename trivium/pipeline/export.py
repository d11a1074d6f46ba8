"""A model for other programs: GGUF with a Modelfile, a merged folder, an adapter, a repository of the hub."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.files import read_object, whole_folder, write_text
from trivium.kit.seals import RECORD, read_record
from trivium.model.adapters import CONFIG as ADAPTER
from trivium.model.adapters import WEIGHTS as ADAPTER_WEIGHTS
from trivium.model.folder import load_config, load_model, save_model
from trivium.model.gguf.write import Kind, write_gguf
from trivium.model.hub import HUB_NAME
from trivium.model.modalities.llava_export import save_llava
from trivium.model.vocabulary import grow_vocabulary
from trivium.tokens.adopt import PLACEHOLDER, with_placeholder
from trivium.tokens.forms import read_forms
from trivium.tokens.tokenizer import Tokenizer

SENT = ("*.json", "*.safetensors", "*.jinja", "*.model", "README.md", "LICENSE*", "adapter/*", "modalities/*")
"""What of a folder goes to the hub."""
CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_PROBE = [
    {"role": "system", "content": "a"}, {"role": "user", "content": "b"},
]  # fmt: skip


def to_gguf(folder: Path, path: Path, kind: Kind, name: str, say: Callable[[str], None]) -> None:
    """Write FILE, and a `Modelfile` beside it from which `ollama create NAME` makes a model."""
    if read_forms(folder) is not None:
        say("The file holds the language model alone: its eyes and ears have no place in it.")
    write_gguf(folder, path, kind, name=name, say=say)
    write_text(path.with_name("Modelfile"), modelfile(folder, path.name))
    say(f"Wrote {path} ({path.stat().st_size / 2**20:.0f} MiB) and a Modelfile beside it.")


def modelfile(folder: Path, file: str) -> str:
    """Ollama's description of a model: its file, its template in Ollama's language where known, its stops."""
    tokenizer = Tokenizer.load(folder)
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {load_config(folder).context}"]
    lines += [f'PARAMETER stop "{tokenizer.token(one)}"' for one in sorted(tokenizer.stop_ids)]
    if tokenizer.templates and _is_chatml(tokenizer):
        lines.append(f'TEMPLATE """{CHATML}"""')
    elif tokenizer.templates:
        lines.append("# The chat template is in the file; Ollama translates the common ones by itself.")
    return "\n".join(lines) + "\n"


def _is_chatml(tokenizer: Tokenizer) -> bool:
    written = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in _PROBE)
    try:
        return (
            tokenizer.render_chat(_PROBE, add_generation_prompt=True) == f"{written}<|im_start|>assistant\n"
        )
    except TriviumError:
        return False


def to_folder(folder: Path, target: Path) -> None:
    """Write a plain Hugging Face folder, adapters added to their matrices."""
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    ends = {"eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    _refuse_a_filled(target)
    with whole_folder(target) as beside:
        save_model(model, beside, generation=ends)
        tokenizer.save(beside)


def to_llava(folder: Path, target: Path) -> None:
    """Write the form of LLaVA, in which a control token stands for a picture."""
    model, before = load_model(folder), Tokenizer.load(folder)
    tokenizer = with_placeholder(before)
    if tokenizer is not before:
        grow_vocabulary(model, before, tokenizer, seed=0)
    placeholder = tokenizer.token_id(PLACEHOLDER)
    assert placeholder is not None, "just added"
    ends = {"eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    _refuse_a_filled(target)
    with whole_folder(target) as beside:
        save_llava(model, beside, placeholder=placeholder, generation=ends)
        tokenizer.save(beside)


def to_peft(folder: Path, target: Path) -> str:
    """Copy the adapter that a stage saved, with the tokenizer it was trained with; the name of its base."""
    adapter = folder if (folder / ADAPTER).is_file() else folder / "adapter"
    if not (adapter / ADAPTER).is_file():
        raise TriviumError(
            f"{folder} holds no adapter: train with `adapter: {{rank: 16}}`, or export with --to hf."
        )
    _refuse_a_filled(target)
    with whole_folder(target) as beside:
        for name in (ADAPTER, ADAPTER_WEIGHTS):
            shutil.copyfile(adapter / name, beside / name)
        if (folder / "tokenizer.json").is_file():
            Tokenizer.load(folder).save(beside)
    return str(read_object(target / ADAPTER).get("base_model_name_or_path"))


def _refuse_a_filled(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TriviumError(f"{target} is there already and not empty; name another folder.")


def to_hub(
    folder: Path,
    repository: str,
    *,
    licence: str | None,
    private: bool,
    dry: bool,
    say: Callable[[str], None],
) -> None:
    """Send a model's folder with a card to `owner/name`; a dry run only says what would be sent."""
    if not HUB_NAME.match(repository) or "@" in repository:
        raise TriviumError(f"--out {repository} is no repository of the hub; write owner/name.")
    files = sorted({path for pattern in SENT for path in folder.glob(pattern) if path.is_file()})
    own = folder / "README.md"
    text = own.read_text(encoding="utf-8") if own.is_file() else card(folder, repository, licence)
    if licence is None and own not in files and "license:" not in text:
        raise TriviumError("a model on the hub needs a licence: name one, as --licence apache-2.0.")
    for path in files:
        size = f"{path.stat().st_size / 2**20:.1f} MiB"
        say(f"{'would send' if dry else 'send'} {path.relative_to(folder)} ({size})")
    if dry:
        say(f"would send README.md:\n{text}")
        return
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi()
    operations = [
        huggingface_hub.CommitOperationAdd(path.relative_to(folder).as_posix(), str(path))
        for path in files
        if path != own
    ]
    operations.append(huggingface_hub.CommitOperationAdd("README.md", text.encode("utf-8")))
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        made = api.create_commit(repository, operations, commit_message="Upload model")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TriviumError(f"the hub did not take {repository}: {reason}") from error
    say(f"Sent to {made.repo_url if made.repo_url else repository}.")


def card(folder: Path, repository: str, licence: str | None) -> str:
    """A model card: what made the model, from what, and how to use it."""
    record = read_record(folder.parent) if (folder.parent / RECORD).is_file() else {}
    settings: dict[str, Any] = record.get("settings") or {}
    base = next((name for name in (record.get("outside") or {}) if HUB_NAME.match(name)), None)
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"license: {licence}"] if licence else []
    head += [f"base_model: {base}"] if base else []
    head += ["tags: [trivium]", "---", "", f"# {repository.rpartition('/')[2]}", ""]
    if record:
        head.append(
            f"Made by the stage `{record['stage']}` ({record['kind']}) of the recipe `{record['recipe']}` "
            "with Trivium."
        )
        shown = {key: value for key, value in settings.items() if isinstance(value, (str, int, float, bool))}
        head += ["", "| setting | value |", "|---|---|"]
        head += [f"| `{key}` | {value} |" for key, value in sorted(shown.items())]
        summary = {k: v for k, v in (record.get("summary") or {}).items() if isinstance(v, (int, float))}
        if summary:
            head += ["", "| measured | value |", "|---|---|"]
            head += [f"| {key} | {value:.6g} |" for key, value in sorted(summary.items())]
    head += ["", "```python", "from transformers import pipeline", "",
             f'pipe = pipeline("text-generation", "{repository}")', "```", ""]  # fmt: skip
    return "\n".join(head)
