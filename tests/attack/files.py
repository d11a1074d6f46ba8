"""Files that lie: damaged states, folders that reach out, data that expands, disks that forget."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from disk import LossyDisk
from fuzz.files import _model_folder
from small import assert_identical, small_model, small_trainer, weights_of
from test_data_limits import ROOM, bomb, within
from test_lock import hold, is_refused, own_namespaces
from test_recipe_yaml import FAULTS
from toys import RECIPE, write_recipe

from attack.frame import attack
from trivium.data.sources import Source, read_documents
from trivium.kit import seals
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, save_tensors, write_json
from trivium.learn.checkpoints import Checkpoints
from trivium.model.folder import load_model
from trivium.pipeline.plan import plan
from trivium.pipeline.run import prepare, run
from trivium.pipeline.store import Store
from trivium.tokens.tokenizer import Tokenizer


def _refused(work: Callable[[], Any], said: str = "") -> None:
    """Whatever `work` is, it ends in one sentence."""
    with pytest.raises(TriviumError, match=re.escape(said)):
        work()


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(content)


@attack("stored files", "a flipped bit of a saved state", cases={
    f"{name} at {part}/8": (name, part) for name in ("state.json", "tensors.safetensors") for part in range(8)
})  # fmt: skip
def flipped_state(scratch: Path, value: tuple[str, int]) -> None:
    """The state before it is used, and the run ends as one that was left alone."""
    name, part = value
    straight = small_model()
    small_trainer(scratch / "straight", model=straight).run()
    trainer = small_trainer(scratch / "cut", checkpoint={"every_steps": 3})
    trainer.run()
    path = trainer.checkpoints.path(6) / name
    _flip(path, path.stat().st_size * part // 8)
    assert small_trainer(scratch / "cut").checkpoints.steps() == [3, 6]
    again = small_model(seed=9)
    small_trainer(scratch / "cut", model=again).run()
    assert_identical(weights_of(straight), weights_of(again))


@attack("stored files", "a changed number of a saved state")
def changed_state(scratch: Path) -> None:
    """A step that is another is not resumed from."""
    trainer = small_trainer(scratch, checkpoint={"every_steps": 3})
    trainer.run()
    path = trainer.checkpoints.path(6) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 2}))
    state = small_trainer(scratch).checkpoints.latest()
    assert state is not None
    assert state.facts["step"] == 3


@attack("stored files", "a damaged file of a finished stage", cases={
    name: name for name in ("model/model.json", "stage.yaml", "metrics.jsonl", "COMPLETE")
})  # fmt: skip
def damaged_result(scratch: Path, name: str) -> None:
    """It is named where another stage would start from it."""
    path = write_recipe(scratch)
    prepared = run(path, scratch / "runs", only=["base"])
    damaged = prepared.entry("base").folder / name
    content = damaged.read_bytes()
    damaged.write_bytes(content.replace(b"4", b"5") if b"4" in content else content.replace(b"1", b"2"))
    seals._checked.clear()
    _refused(lambda: run(path, scratch / "runs"), name)


@attack("stored files", "damaged optimiser moments")
def damaged_moments(scratch: Path) -> None:
    """A changed number of a moment is found though the file can be read."""
    save_tensors(scratch / "moments.safetensors", {"first.a": torch.ones(3)})
    write_json(scratch / "training.json", {})
    (scratch / "stage.yaml").write_text("stage: base\n")
    seals.seal_folder(scratch, list(scratch.iterdir()), [])
    seals.compared(scratch / "moments.safetensors")
    save_tensors(scratch / "moments.safetensors", {"first.a": torch.full((3,), 2.0)})
    load_tensors(scratch / "moments.safetensors")
    _refused(lambda: seals.compared(scratch / "moments.safetensors"), "is damaged")


@attack("recipes", "a YAML file with", seconds=60.0, cases=FAULTS)
def yaml_fault(scratch: Path, value: tuple[str, str]) -> None:
    """A plan of it ends in one sentence."""
    (scratch / "r.yaml").write_text(value[0])
    _refused(lambda: prepare(scratch / "r.yaml", scratch / "runs"), "r.yaml")


@attack("recipes", "a pattern over the whole disk", seconds=120.0, cases={
    pattern: pattern for pattern in ("/**/*.jsonl", "/**", "/*/*/*/*/*/*/*")
})  # fmt: skip
def whole_disk(scratch: Path, pattern: str) -> None:
    """A plan either lists it or refuses it, but does not go on for ever."""
    (scratch / "r.yaml").write_text(f"stages: {{a: {{kind: corpus, data: '{pattern}', tokenizer: nothing}}}}")
    _refused(lambda: prepare(scratch / "r.yaml", scratch / "runs"))


PLACES = {
    "memory": "/proc/self/mem", "zeros": "/dev/zero", "noise": "/dev/random",
    "processes": "/proc", "devices": "/sys",
    "the whole disk": "/", "a null": "a\0b", "a name of 5,000 letters": "a" * 5000, "a pipe": "pipe",
}  # fmt: skip


@attack("recipes", "data that are", seconds=120.0, cases=PLACES)
def odd_place(scratch: Path, place: str) -> None:
    """A plan of it ends in one sentence."""
    os.mkfifo(scratch / "pipe")
    settings = f"{{kind: tokenizer, data: {json.dumps(place)}, vocabulary: 300}}"
    (scratch / "r.yaml").write_text(f"stages: {{words: {settings}}}")
    _refused(lambda: prepare(scratch / "r.yaml", scratch / "runs"))


ABSURD = (
    "seed=1e400", "seed=-1e30", "name=../x", "stages={}", "report.compare=[1,{}]",
    *(f"stages.base.{setting}" for setting in (
        "tokens=1e400", "tokens=-1", "tokens=.nan", "context=1e18", "model.layers=1e12", 
        "learning_rate=.inf", "from=base", "micro_batch=0", "model.depth=1e9", "data={'a': {'weight': -1}}",
    )),
)  # fmt: skip


@attack("recipes", "a shipped recipe with --set", seconds=60.0, cases={one: one for one in ABSURD})
def absurd(scratch: Path, setting: str) -> None:
    """A plan of it ends in one sentence."""
    _refused(lambda: plan("pocket", scratch / "runs", [setting]))


@attack("recipes", "an experiment of a thousand million seeds")
def seeds(scratch: Path) -> None:
    """It is refused before its graph is made."""
    _refused(
        lambda: prepare("experiments/dilution", scratch / "runs", ["experiment.seeds=1000000000"]), "seeds"
    )


@attack(
    "data files",
    "128 KB of zstd that are 4 GB, as",
    cases={kind: kind for kind in ("txt", "jsonl", "json", "csv")},
)
def expanding(scratch: Path, kind: str) -> None:
    """Refused in a process that has 400 MB to spare."""
    bomb(scratch / f"a.{kind}.zst")
    said = within(
        ROOM, lambda: list(read_documents(Source(path=str(scratch / f"a.{kind}.zst"), on_bad="skip")))
    )
    assert "TriviumError" in said, said


@attack("data files", "4 MB of gzip that are 4 GB")
def expanding_gzip(scratch: Path) -> None:
    """The same."""
    bomb(scratch / "a.jsonl.gz")
    said = within(
        3 * ROOM, lambda: list(read_documents(Source(path=str(scratch / "a.jsonl.gz"), on_bad="skip")))
    )
    assert "TriviumError" in said, said


def _changed_model(scratch: Path, file: str, changes: dict[str, Any]) -> Path:
    shutil.copytree(_model_folder() / "model", scratch / "model")
    path = scratch / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return scratch / "model"


@attack("model folders", "a config.json with", cases={
    "a billion layers": {"num_hidden_layers": 10**9}, "a vocabulary of 10^12": {"vocab_size": 10**12},
    "a vocabulary of 2^24": {"vocab_size": 2**24}, "a width of 2^20": {"hidden_size": 2**20},
    "900 layers": {"num_hidden_layers": 900}, "half a layer": {"num_hidden_layers": 0.5},
    "a context without end": {"max_position_embeddings": 10**30}, "no heads": {"num_attention_heads": 0},
})  # fmt: skip
def too_large(scratch: Path, changes: dict[str, Any]) -> None:
    """Refused before room is made."""
    place = _changed_model(scratch, "config.json", changes)
    said = within(ROOM, lambda: load_model(place))
    assert said.startswith("TriviumError"), said


@attack("model folders", "an index that names", cases={
    name: name for name in ("../model.safetensors", "/etc/hostname", "..", "a/b.safetensors", "model.bin")
})  # fmt: skip
def index_elsewhere(scratch: Path, name: str) -> None:
    """No file is read that does not lie in the folder."""
    index = "model.safetensors.index.json"
    names = json.loads((_model_folder() / "model" / index).read_text())["weight_map"]
    place = _changed_model(scratch, index, {"weight_map": names | {"model.norm.weight": name}})
    _refused(lambda: load_model(place), index)


@attack("model folders", "an adapter to a model of the hub")
def adapter_fetches(scratch: Path) -> None:
    """Nothing is fetched unless a person names it."""
    shutil.copytree(_model_folder() / "adapter", scratch / "model" / "adapter")
    shutil.copy(_model_folder() / "model" / "config.json", scratch / "model")
    write_json(
        scratch / "model" / "adapter" / "adapter_config.json",
        json.loads((_model_folder() / "adapter" / "adapter_config.json").read_text())
        | {"base_model_name_or_path": "somebody/something"},
    )
    with mock.patch("huggingface_hub.snapshot_download", side_effect=OSError("asked")) as asked:
        _refused(lambda: load_model(scratch / "model"), "not on this machine")
    assert all(call.kwargs["local_files_only"] for call in asked.call_args_list)


@attack("two writers", cases={"in another namespace": True, "under another host name": False})
def two_writers(scratch: Path, value: bool) -> None:
    """A stage that a process works on is refused to another, and free when that one is killed."""
    before = tuple(own_namespaces()) if value else ()
    process = hold(scratch / "entry", "elsewhere", before=before)
    try:
        assert is_refused(scratch / "entry")
    finally:
        process.kill()
        process.communicate()
    assert not is_refused(scratch / "entry")


@attack("power cuts", cases={"names and content are lost": "names and content", "content is lost": "content"})
def power_cut_in_training(scratch: Path, loses: Any) -> None:
    """After every fsync of a training, the newest state that was saved is whole."""
    (scratch / "cut").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        disk, saved, write = LossyDisk(scratch / "cut", patch), [(0, 0)], Checkpoints._write

        def note(self: Checkpoints, step: int, *arguments: Any) -> None:
            write(self, step, *arguments)
            saved.append((len(disk.moments), step))

        patch.setattr(Checkpoints, "_write", note)
        small_trainer(scratch / "cut", checkpoint={"every_steps": 1}).run()
    for moment in range(len(disk.moments)):
        state = small_trainer(disk.after(moment, scratch / str(moment), loses)).checkpoints.latest()
        newest = max(step for count, step in saved if count <= moment)
        assert (state.facts["step"] if state else 0) >= newest


@attack(
    "power cuts",
    cases={"names and content of a recipe": "names and content", "content of a recipe": "content"},
)
def power_cut_in_a_recipe(scratch: Path, loses: Any) -> None:
    """After every fsync of a recipe, a stage that says it is done is whole."""
    path = write_recipe(scratch, RECIPE)
    (scratch / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        disk = LossyDisk(scratch / "runs", patch)
        run(path, scratch / "runs", only=["base"])
    for moment in range(len(disk.moments)):
        for entry in Store(disk.after(moment, scratch / str(moment), loses)).entries():
            if entry.state == "done":
                entry.verify(entry.output)


@attack(
    "odd files",
    cases={"a pipe": "pipe", "a folder": "folder", "an empty file": "empty", "a link to itself": "link"},
)
def odd_files(scratch: Path, kind: str) -> None:
    """In the place of any file of a model, it is refused and not waited for."""
    for number, path in enumerate(sorted((_model_folder() / "model").iterdir())):
        if path.name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
            continue
        place = scratch / str(number)
        shutil.copytree(_model_folder() / "model", place)
        (place / path.name).unlink()
        make: dict[str, Callable[[Path], Any]] = {
            "pipe": os.mkfifo, "folder": Path.mkdir, "empty": Path.touch,
            "link": lambda one: one.symlink_to(one),
        }  # fmt: skip
        make[kind](place / path.name)
        _refused(lambda place=place: (load_model(place), Tokenizer.load(place)))
