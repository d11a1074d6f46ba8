"""The documentation's stages are read by the schema that reads a person's recipe."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from trivium.learn.objectives.policy_losses import ALGORITHMS, PPO_ALGORITHMS
from trivium.recipe.read import _load
from trivium.recipe.reference import reference
from trivium.stages import is_in_a_file, kinds

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = [
    (page.name, number, block)
    for page in sorted(DOCS.glob("*.md"))
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.S))
    if "kind:" in block
]


def stages_of(block: str) -> dict[str, dict]:
    """The stages written in a block, whether it shows a whole recipe or a few of its stages."""
    with TemporaryDirectory() as folder:
        page = Path(folder) / "block.yaml"
        page.write_text(block, encoding="utf-8")
        content, _ = _load(page)
    found = content.get("stages", content)
    return {name: stage for name, stage in found.items() if isinstance(stage, dict) and "kind" in stage}


WRITTEN = [
    pytest.param(stage, id=f"{page}-{number}-{name}")
    for page, number, block in BLOCKS
    for name, stage in stages_of(block).items()
    if stage["kind"] != "KIND" and not is_in_a_file(stage["kind"])
]


@pytest.mark.parametrize("stage", WRITTEN)
def test_a_stage_in_the_documentation_is_valid(stage):
    assert kinds()[stage["kind"]].model_validate(stage).kind == stage["kind"]


def test_every_kind_is_documented():
    page = (DOCS / "stages.md").read_text(encoding="utf-8")
    table = page.partition("| kind | starts from | makes |")[2].partition("\n\n")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.M))
    # Other tests bring toy stages of their own.
    assert listed == {name for name, kind in kinds().items() if kind.__module__.startswith("trivium.")}


def test_every_algorithm_is_documented():
    table = (DOCS / "reinforcement.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w+]+)`", table, re.M)) == {
        "algorithm",
        "estimator",
        *ALGORITHMS,
        *PPO_ALGORITHMS,
    }


def test_the_pages_that_are_linked_exist():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_page_of_settings_is_what_the_fields_say():
    """`trivium schema --markdown --to docs/settings.md` writes it; a setting without a description fails."""
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == reference()


def test_the_optimiser_that_is_said_is_the_one_in_force():
    line = next(
        one for one in (DOCS / "recipes.md").read_text().splitlines() if one.startswith("| `optimiser`")
    )
    said = set(re.findall(r"`(\w+)`", line.rpartition("|")[0].rpartition("|")[2].partition(";")[0])) - {
        "muon"
    }
    ours = {name: kind for name, kind in kinds().items() if kind.__module__.startswith("trivium.stages.")}
    fields = {name: kind.model_fields.get("optimiser") for name, kind in ours.items()}
    assert said == {name for name, field in fields.items() if field is not None and field.default == "muon"}
