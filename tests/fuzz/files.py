"""Fuzz targets of what is read from disk: recipes, model folders, states, shards and data files."""

import contextlib
import copy
import gzip
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import torch
import yaml
import zstandard
from hypothesis import strategies as st

from fuzz.frame import fuzz
from trivium.data.shards import Shards, write_shards
from trivium.data.sources import Document, Source, read_documents
from trivium.kit.files import load_tensors, save_tensors
from trivium.kit.seals import read_record, read_seal
from trivium.learn.checkpoints import read_state, write_state
from trivium.model.adapters import load_adapter, save_adapter
from trivium.model.config import ModelConfig
from trivium.model.folder import load_model, save_model
from trivium.model.initialise import new_model
from trivium.model.lora import AdapterSettings, add_adapter
from trivium.recipe import graph
from trivium.recipe.read import LIBRARY, read
from trivium.recipe.schema import load
from trivium.recipe.yaml_text import parse
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import train_tokenizer

_ODD = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2**31, 10**12, 10**400, 0.5, 1e308, float("nan"), float("inf")),
        *(
            "",
            " ",
            "x",
            "1",
            "1e400",
            "\0",
            "\ud800",
            "../x",
            "/",
            "a/b",
            "*",
            "a" * 3000,
            "k",
            "world:",
            "@",
        ),
        *([], {}, [[]], [None], {"": None}, {"a": [1]}, "world:prose?x=1", "base@tokens=2M", "owner/name"),
    ]
)
_JSON = st.recursive(
    _ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
)
"""Any value that JSON can write, and some that it cannot."""


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder for one example, in memory where there is room."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as place:
        yield Path(place)


def _places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, one in inside for place in _places(one, (*here, key)))]


def changed(content: Any, changes: list[tuple[int, Any]]) -> Any:
    """A copy with some of its values replaced, each found by a number."""
    content = json.loads(json.dumps(content))
    for number, value in changes:
        places = _places(content)[1:]
        if not places:
            break
        *above, last = places[number % len(places)]
        inside = content
        for key in above:
            inside = inside[key]
        inside[last] = copy.deepcopy(value)
    return content


CHANGES = st.lists(st.tuples(st.integers(0, 10_000), _JSON), min_size=1, max_size=3)
FLIPS = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), max_size=4)
"""Bytes of a file, by number, and what becomes of them."""
DAMAGE = st.tuples(FLIPS, st.none() | st.integers(0, 1 << 30))
"""The same, and where the file is cut off."""


def damaged(content: bytes, damage: tuple[list[tuple[int, int]], int | None]) -> bytes:
    """The content with some bytes changed, perhaps cut off."""
    found = bytearray(content)
    for place, value in damage[0]:
        if found:
            found[place % len(found)] = value
    return bytes(found if damage[1] is None else found[: damage[1] % (len(found) + 1)])


_YAML = st.lists(
    st.sampled_from(
        [
            *(
                "a",
                "b: ",
                "- ",
                "\n",
                "\n  ",
                "[",
                "]",
                "{",
                "}",
                ", ",
                "&a ",
                "*a",
                "<<: ",
                "? ",
                ": ",
                "| ",
                "> ",
            ),
            *(
                "!!str ",
                "!!binary ",
                "!!set ",
                "!!timestamp ",
                "'",
                '"',
                "#",
                "---\n",
                "...\n",
                "~",
                "0x1",
                "1e3",
            ),
            *(
                "2024-01-01",
                ".inf",
                ".nan",
                "0o7",
                "190:20",
                "%YAML 1.1\n",
                "\\x",
                "\t",
                "stages: ",
                "kind: sft\n",
            ),
        ]
    )
    | st.text(max_size=3),
    max_size=60,
).map("".join)


@fuzz("recipe: YAML", _YAML)
def recipe_text(text: str) -> None:
    """Any text is a recipe's content or refused."""
    content, lines = parse(text, "recipe.yaml")
    assert content is None or isinstance(lines, dict)


@cache
def _library() -> list[dict[str, Any]]:
    return [
        read(path.relative_to(LIBRARY).with_suffix("").as_posix()).content for path in LIBRARY.rglob("*.yaml")
    ]


@fuzz("recipe: settings", st.tuples(st.integers(0, 100), CHANGES), seconds=20.0)
def recipe_settings(example: tuple[int, list[tuple[int, Any]]]) -> None:
    """A recipe that ships, with values replaced: a graph or refused."""
    number, changes = example
    content = changed(_library()[number % len(_library())], changes)
    with folder() as place:
        (place / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8", errors="replace")
        graph.build(load(place / "recipe.yaml"))


@fuzz(
    "recipe: --set",
    st.lists(st.tuples(st.text("stages.base.01[]=", max_size=20), _YAML), max_size=3),
    seconds=20.0,
)
def overrides(example: list[tuple[str, str]]) -> None:
    """Whatever is set in a recipe, it is read or refused."""
    read("pocket", [f"{key}={value}" for key, value in example])


@cache
def _model_folder() -> Path:
    """A small model in two files, its tokenizer, and an adapter."""
    place = Path(tempfile.mkdtemp(prefix="fuzz-model-"))
    tokenizer = train_tokenizer(["the river rises and the miller counts 12 sacks"] * 20, vocabulary=300)
    config = ModelConfig(tokenizer.vocabulary_size, 16, 2, 2, 24, 32, query_key_norm="head")
    model = new_model(config)
    tokenizer.save(place / "model")
    save_model(model, place / "model", shard_bytes=20_000)
    add_adapter(model, AdapterSettings(rank=2), seed=1)
    save_adapter(model, place / "adapter", base=str(place / "model"))
    return place


_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
          "model.safetensors.index.json"]  # fmt: skip


def _open(place: Path) -> None:
    """The model of a folder and its tokenizer, both used once."""
    tokenizer = Tokenizer.load(place)
    tokenizer.encode("the river é 12")
    load_model(place)


@fuzz("model folder: values", st.tuples(st.sampled_from(_FILES), CHANGES), seconds=20.0)
def model_values(example: tuple[str, list[tuple[int, Any]]]) -> None:
    """One file of the folder with values replaced: a model or refused."""
    name, changes = example
    with folder() as place:
        shutil.copytree(_model_folder() / "model", place / "model")
        path = place / "model" / name
        path.write_text(json.dumps(changed(json.loads(path.read_text()), changes)))
        _open(place / "model")


@fuzz("model folder: bytes", st.tuples(st.integers(0, 100), DAMAGE), seconds=20.0)
def model_bytes(example: tuple[int, Any]) -> None:
    """One file of the folder with bytes changed: a model or refused."""
    number, damage = example
    with folder() as place:
        shutil.copytree(_model_folder() / "model", place / "model")
        files = sorted((place / "model").iterdir())
        path = files[number % len(files)]
        path.write_bytes(damaged(path.read_bytes(), damage))
        _open(place / "model")


@fuzz("safetensors reader", st.tuples(DAMAGE, st.none() | CHANGES))
def safetensors(example: tuple[Any, Any]) -> None:
    """A file of tensors with another header, or with bytes changed, is read or refused."""
    damage, changes = example
    with folder() as place:
        path = place / "a.safetensors"
        save_tensors(path, {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)})
        content = path.read_bytes()
        if changes is not None:
            size = int.from_bytes(content[:8], "little")
            header = json.dumps(changed(json.loads(content[8 : 8 + size]), changes)).encode()
            content = len(header).to_bytes(8, "little") + header + content[8 + size :]
        path.write_bytes(damaged(content, damage))
        load_tensors(path)


@fuzz("adapter", st.tuples(CHANGES | st.none(), DAMAGE), seconds=20.0)
def adapter(example: tuple[Any, Any]) -> None:
    """An adapter's settings with values replaced, its weights with bytes changed: laid on, or refused."""
    changes, damage = example
    with folder() as place:
        shutil.copytree(_model_folder() / "adapter", place / "adapter")
        path = place / "adapter" / "adapter_config.json"
        if changes is not None:
            path.write_text(json.dumps(changed(json.loads(path.read_text()), changes)))
        weights = place / "adapter" / "adapter_model.safetensors"
        weights.write_bytes(damaged(weights.read_bytes(), damage))
        load_adapter(load_model(_model_folder() / "model"), place / "adapter")


@fuzz("saved state", st.tuples(st.booleans(), DAMAGE))
def state(example: tuple[bool, Any]) -> None:
    """A state with bytes changed is refused, or what was saved."""
    which, damage = example
    with folder() as place:
        facts = {"step": 6, "feed": {"plan": "abc"}, "seconds": 1.5, "nothing": float("nan")}
        write_state(place / "state", facts, {"weights.a": torch.arange(5.0)})
        path = place / "state" / ("state.json" if which else "tensors.safetensors")
        path.write_bytes(damaged(path.read_bytes(), damage))
        found = read_state(place / "state")
        assert found.facts["step"] == 6
        assert found.facts["feed"] == {"plan": "abc"}
        assert torch.equal(found.tensors["weights.a"], torch.arange(5.0))


@fuzz("record and seal", st.tuples(st.booleans(), DAMAGE))
def record(example: tuple[bool, Any]) -> None:
    """What a stage wrote of itself, with bytes changed, is read as a mapping or refused."""
    which, damage = example
    with folder() as place:
        text = "stage: base\nkind: pretrain\nsettings: {steps: 3}\nparents: {}\n"
        content = json.dumps({"files": {"model/a": "0" * 32}}).encode() if which else text.encode()
        (place / ("COMPLETE" if which else "stage.yaml")).write_bytes(damaged(content, damage))
        assert isinstance(read_seal(place) if which else read_record(place), dict)


@cache
def _shards() -> Path:
    place = Path(tempfile.mkdtemp(prefix="fuzz-shards-"))
    documents = [Document(f"the river rises {number}", {}, f"a:{number}") for number in range(9)]
    write_shards(documents, Tokenizer.load(_model_folder() / "model"), place / "data", validation=0.3)
    return place / "data"


@fuzz("shards", st.tuples(st.integers(0, 100), DAMAGE))
def shards(example: tuple[int, Any]) -> None:
    """A corpus with bytes changed in one file is refused, or every document of it is as it was."""
    number, damage = example
    with folder() as place:
        shutil.copytree(_shards(), place / "data")
        files = sorted(path for path in (place / "data").iterdir() if path.is_file())
        path = files[number % len(files)]
        path.write_bytes(damaged(path.read_bytes(), damage))
        whole, found = Shards(_shards()), Shards(place / "data")
        assert all(np.array_equal(whole.document(i), found.document(i)) for i in range(len(whole)))
        assert [whole.id(i) for i in range(len(whole))] == [found.id(i) for i in range(len(found))]


ROWS = [{"text": "one\ntwo", "n": 1}, {"text": 'say "hi", é漢🙂', "n": None}, {"text": "end", "n": 3}]
SEPARATORS = st.none() | st.sampled_from(["\n", "\n\n", ",", "a", "é"])


def _read(name: str, content: bytes, separator: str | None = None) -> None:
    """Read a file to its end: its malformed entries are counted, and what is read is text or fields."""
    with folder() as place:
        (place / name).write_bytes(content)
        source = Source(path=str(place / name), on_bad="skip", separator=separator)
        for document in read_documents(source):
            assert document.text is None or isinstance(document.text, str)
            assert isinstance(document.fields, dict)


_LINES = st.lists(
    st.sampled_from(
        [
            *'{}[]",:\\\n\r\t\0 a1',
            '{"text": "a"}',
            '"text"',
            "null",
            "NaN",
            "1e999",
            "\\u",
            "\\ud800",
            "\ufeff",
            "[" * 200,
        ]
    )
    | st.text(max_size=3),
    max_size=40,
).map(lambda parts: "".join(parts).encode("utf-8", "surrogatepass"))


@fuzz(
    "text, jsonl, json, csv",
    st.tuples(st.sampled_from(["txt", "jsonl", "json", "csv", "tsv"]), _LINES, SEPARATORS),
)
def lines(example: tuple[str, bytes, str | None]) -> None:
    """Any bytes under any of these endings are read or refused."""
    kind, content, separator = example
    _read(f"a.{kind}", content, separator)


def _compressed(kind: str, content: bytes) -> bytes:
    compress: Callable[[bytes], bytes] = gzip.compress if kind == "gz" else zstandard.compress
    return compress(content)


@fuzz("compressed data", st.tuples(st.sampled_from(["gz", "zst"]), _LINES, DAMAGE))
def compressed(example: tuple[str, bytes, Any]) -> None:
    """A compressed file with bytes changed is read or refused."""
    kind, content, damage = example
    _read(f"a.jsonl.{kind}", damaged(_compressed(kind, content), damage))


@cache
def _tables() -> dict[str, bytes]:
    table = arrow.Table.from_pylist(ROWS * 50)
    found = {}
    for compression in ("none", "snappy", "zstd", "gzip"):
        sink = io.BytesIO()
        parquet.write_table(table, sink, compression=compression)
        found[compression] = sink.getvalue()
    return found


@fuzz("parquet", st.tuples(st.sampled_from(["none", "snappy", "zstd", "gzip"]), DAMAGE))
def tables(example: tuple[str, Any]) -> None:
    """A parquet file with bytes changed is read or refused."""
    compression, damage = example
    _read("a.parquet", damaged(_tables()[compression], damage))


@fuzz("arrow stream", DAMAGE)
def arrow_stream(damage: Any) -> None:
    """A data set on disk with bytes changed in its rows is read or refused."""
    sink = io.BytesIO()
    table = arrow.Table.from_pylist(ROWS * 20)
    with arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with folder() as place:
        (place / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
        (place / "a.arrow").write_bytes(damaged(sink.getvalue(), damage))
        list(read_documents(Source(path=str(place), on_bad="skip")))
