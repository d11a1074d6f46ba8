"""The recipes for real checkpoints and data, planned on stand-ins: tiny models, a few rows of each form."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gguf_files import folder_of

from trivium.pipeline.plan import plan

RECIPES = sorted((Path(__file__).parent.parent / "recipes" / "real").glob("*.yaml"))
HEADER = ("data", "hardware", "time", "expect")
ON_THE_HUB = re.compile(r"from: ((?:HuggingFaceTB|Qwen)/[\w.-]+)")
TEXT = "The water cycle moves water between the sea, the air and the land. " * 60


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and data of every form that the recipes name, in thirty rows each."""
    folder = tmp_path_factory.mktemp("stand-ins")
    folder_of("llama", folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    data = folder / "data"
    seen = ("japanese", "english", "domain", "general")
    for place in ("books", "short", *seen, *(f"{name}_test" for name in seen)):
        (data / place).mkdir(parents=True)
        for number in range(30):
            (data / place / f"{number}.txt").write_text(f"{number} {TEXT}")
    (data / "wikitext2_valid.txt").write_text("\n\n".join(f"{number} {TEXT}" for number in range(70)))
    rows(
        data / "gsm8k_train.jsonl",
        lambda n: {"question": f"What is {n} + 1?", "answer": f"So.\n#### {n + 1}"},
    )
    rows(
        data / "gsm8k_test.jsonl", lambda n: {"question": f"What is {n} + 2?", "answer": f"So.\n#### {n + 2}"}
    )
    rows(
        data / "chats.jsonl",
        lambda n: {
            "messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Yes."}]
        },
    )
    rows(data / "pairs.jsonl", lambda n: {"prompt": f"Name {n}.", "chosen": f"It is {n}.", "rejected": "No."})
    rows(
        data / "questions.jsonl",
        lambda n: {
            "question": f"How many above {n}?",
            "sql": f"select count(*) from sales where price > {n}",
        },
    )
    with sqlite3.connect(data / "shop.sqlite") as shop:
        shop.execute("create table sales (price integer)")
        shop.executemany("insert into sales values (?)", [(n,) for n in range(40)])
    (data / "fineweb-edu").mkdir()
    pq.write_table(pa.table({"text": [f"{n} {TEXT}" for n in range(30)]}), data / "fineweb-edu" / "a.parquet")
    return folder


def rows(path: Path, row: object) -> None:
    """Thirty rows of JSON lines."""
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(30)))  # type: ignore[operator]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_needs(recipe: Path) -> None:
    head = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    for word in HEADER:
        assert any(re.match(rf"# {word}\s{{2}}", line) for line in head), word


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_planned_on_stand_ins(recipe: Path, stand_ins: Path, tmp_path: Path) -> None:
    text = ON_THE_HUB.sub("from: ./model", recipe.read_text())
    # As many tokens as thirty rows give without too many repeats.
    text = re.sub(r"tokens: [\d.]+[MB]\b", "tokens: 64k", text)
    text = re.sub(r"batch: \d+k", "batch: 32768", text).replace("added: 8k", "added: 16")
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(stand_ins / name)
    (tmp_path / recipe.name).write_text(text)
    table = plan(tmp_path / recipe.name, tmp_path / "runs")
    stages = re.findall(r"^  (\w+):", text, re.M)
    assert {row[0] for row in table} >= set(stages)
    assert all(row[2] == "run" for row in table if row[0] in stages)
