"""Installing: extras explained, the doctor's advice, the pages, the notebook, the container."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from trivium.pipeline.doctor import EXTRAS, cuda, missing

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_extra_is_known_to_the_doctor_and_to_the_page():
    extras = set(PROJECT["optional-dependencies"]) - {"dev"}
    assert extras == set(EXTRAS)
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "install.md").read_text(), re.M)
    assert set(listed) == extras | {"dev"}


def test_a_missing_extra_is_answered_with_what_it_is_for_and_packages_that_install():
    rows = dict(missing(["serve"]))
    assert "without serve" not in rows
    assert rows["without quant"].startswith("for the `quantize` stage")
    assert "pip install 'torchao" in rows["without quant"]
    assert all("pip install '" in row and "trivium[" not in row for row in rows.values())


@pytest.mark.parametrize(("version", "index"), [("13.0", "cu130"), ("12.8", "cu128"), ("12.4", "cu126")])
def test_a_driver_without_a_torch_for_it_gets_the_command(tmp_path, monkeypatch, version, index):
    program = tmp_path / "nvidia-smi"
    line = f"| NVIDIA-SMI 570.86.10    Driver Version: 570.86.10    CUDA Version: {version}     |"
    program.write_text(f"#!/bin/sh\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("torch.version.cuda", None)
    rows = dict(cuda())
    assert rows["NVIDIA driver"] == f"570.86.10, for CUDA up to {version}"
    assert rows["torch that fits"].endswith(f"/whl/{index}")


def test_every_page_is_in_the_site_and_every_entry_is_a_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = [page for entry in site["nav"] for page in entry.values()]
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_first_page_and_the_readme_lead_to_every_page():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    for place, above in (("README.md", "docs/"), ("docs/index.md", "")):
        linked = set(re.findall(rf"\]\({above}([a-z_]+\.md)\)", (ROOT / place).read_text(encoding="utf-8")))
        assert linked >= pages, place


def test_the_container_copies_what_is_there_and_runs_as_nobody_in_particular():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    assert any(line.startswith("USER ") for line in lines)
    extras = next(line for line in lines if line.startswith("ARG EXTRAS=")).partition("=")[2].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    # a version that pyproject.toml refuses would be replaced by one of the general index, for another device
    torch = next(one for one in PROJECT["dependencies"] if one.startswith("torch"))
    assert any(f'pip install --no-cache-dir "{torch}" --index-url' in line for line in lines)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes(shell):
    source = [sys.executable, "-c", "from trivium.cli import main; main()"]
    environment = {**os.environ, "_TRIVIUM_COMPLETE": f"{shell}_source"}
    done = subprocess.run(source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "_TRIVIUM_COMPLETE" in done.stdout


def test_the_changelog_names_this_version():
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs" / "notebooks" / "first_hour.ipynb").read_text())
    assert notebook["nbformat"] == 4
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are made when it runs, not kept"
            exec("".join(cell["source"]), names)
    assert (tmp_path / "runs" / "pocket" / "base").exists()


def test_no_page_links_to_one_outside_the_site():
    """`mkdocs build --strict` fails on such a link; a folder is left as it is."""
    for page in (ROOT / "docs").glob("*.md"):
        assert not re.search(r"\]\(\.\./[^)]*\.md", page.read_text(encoding="utf-8")), page.name


def test_what_a_push_runs_are_targets_that_exist():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    run = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    wanted = {line.removeprefix("make ") for line in run if line.startswith("make ")}
    assert wanted >= {"test", "lint", "site", "notebook", "dist"}
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert wanted <= made
