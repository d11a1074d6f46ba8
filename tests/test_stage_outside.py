"""A kind of stage from outside the package: in a file beside the recipe, or in an installed package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from trivium.cli import main
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.pipeline import show
from trivium.pipeline.run import prepare, run
from trivium.recipe.schema import json_schema, load

STAGE = '''
"""Count the letters of a text."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from trivium.kit.files import whole_folder, write_json
from trivium.stages.parts.stage import Product, Reference, Stage, Work


class Letters(Stage):
    """How many letters there are."""

    kind: Literal["letters"]
    produces: ClassVar[Product] = "report"
    computes: ClassVar[bool] = False
    data: str
    times: int = Field(default=1, ge=1)
    """How often they are counted."""

    def references(self) -> list[Reference]:
        return [Reference("data", self.data, ("source",))]

    def run(self, work: Work) -> dict[str, Any]:
        letters = len(work.path(self.data).read_text()) * self.times
        with whole_folder(work.output("report")) as folder:
            write_json(folder / "letters.json", letters)
        return {"letters": letters}

    def documents_of(self, work: Work, step: int) -> list[str]:
        return [f"{self.data}:{step}"]
'''
RECIPE = "name: outside\nstages:\n  count: {kind: KIND, data: ./text.txt, times: 2}\n"


def written(folder: Path, kind: str, stage: str = STAGE) -> Path:
    (folder / "mine.py").write_text(stage)
    (folder / "text.txt").write_text("four")
    (folder / "outside.yaml").write_text(RECIPE.replace("KIND", kind))
    return folder / "outside.yaml"


def test_a_stage_in_a_file_beside_the_recipe_runs_and_its_code_counts(tmp_path):
    path = written(tmp_path, "'mine.py:Letters'")
    prepared = run(path, tmp_path / "runs")
    assert prepared.entry("count").record["summary"] == {"letters": 8}
    assert prepare(path, tmp_path / "runs").entry("count").state == "done"
    assert show.documents(show.find(tmp_path / "runs", "outside/count"), 3) == ["./text.txt:3"]
    written(tmp_path, "'mine.py:Letters'", STAGE.replace("* self.times", "* self.times + 1"))
    assert prepare(path, tmp_path / "runs").entry("count").state == "absent"
    assert run(path, tmp_path / "runs").entry("count").record["summary"] == {"letters": 9}


def test_an_editor_completes_a_kind_in_a_file_and_takes_one_it_does_not_know(tmp_path):
    stage = STAGE.replace('"letters"]', '"schooled"]').replace("Letters", "Schooled")
    path = written(tmp_path, "'mine.py:Schooled'", stage)
    recipe = yaml.safe_load(path.read_text())
    jsonschema.validate(recipe, json_schema())
    main(["schema", str(path), "--to", str(tmp_path / "schema.json")])
    schema = read_json(tmp_path / "schema.json")
    jsonschema.validate(recipe, schema)
    recipe["stages"]["count"]["time"] = 2
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, schema)


@pytest.mark.parametrize(
    ("kind", "stage", "words"),
    [
        (
            "'other.py:Letters'",
            STAGE,
            r"outside\.yaml:3: stages\.count\.kind: .*there is no file .*other\.py",
        ),
        ("'mine.py:Words'", STAGE, "has no stage `Words`"),
        ("'mine.py:Letters'", "import nothing_of_this_name", "cannot be imported: ModuleNotFoundError"),
        ("'mine.py:Letters'", STAGE.replace('"letters"]', '"sft"]'), "`sft` is a kind of Trivium's own"),
    ],
)
def test_a_stage_that_cannot_be_found_is_one_sentence(tmp_path, kind, stage, words):
    with pytest.raises(TriviumError, match=words):
        load(written(tmp_path, kind, stage))


@pytest.mark.slow
def test_an_installed_package_offers_a_kind_through_its_entry_point(tmp_path):
    path = written(tmp_path, "letters", STAGE)
    site = tmp_path / "site"
    metadata = site / "letters-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "letters.py").write_text(STAGE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: letters\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[trivium.stages]\nletters = letters:Letters\n")
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from trivium.pipeline.run import run\nfrom trivium.recipe.schema import json_schema\n"
        f"print(run({str(path)!r}, {str(tmp_path / 'runs')!r}).entry('count').record['summary'])\n"
        "print('Letters' in json_schema()['$defs'])\n"
    )
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert said.stdout.splitlines()[-2:] == ["{'letters': 8}", "True"]
