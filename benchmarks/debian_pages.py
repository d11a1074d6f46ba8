"""A funnel over pages of Debian's documentation packages: what each rule leaves out, with pages to read.

    python benchmarks/debian_pages.py FOLDER [--pages 20000]

Fetches the packages with `apt-get download` (nothing is installed), unpacks their pages into the folder,
curates some of them, and writes `read.md`: ten kept pages, and ten that each rule left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as parquet
import yaml

import trivium

PACKAGES = (
    "apache2-doc", "bash-doc", "cmake-doc", "debian-faq", "debian-handbook", "debmake-doc",
    "developers-reference", "developers-reference-de", "developers-reference-fr",
    "developers-reference-ja", "debian-reference-de", "debian-reference-en", "debian-reference-es",
    "debian-reference-fr", "debian-reference-ja", "debian-reference-zh-cn", "erlang-doc", "ghc-doc",
    "gimp-help-de", "gimp-help-en", "gimp-help-es", "gimp-help-fr", "gimp-help-ja", "gimp-help-ru",
    "git-doc", "installation-guide-amd64", "libboost1.81-doc", "linux-doc-6.1", "maint-guide",
    "maint-guide-de", "maint-guide-es", "maint-guide-fr", "maint-guide-ja", "octave-doc",
    "openjdk-17-doc", "perl-doc", "postgresql-doc-15", "python-django-doc", "python-sympy-doc",
    "python3.11-doc", "r-doc-html", "rust-doc", "sqlite3-doc",
)  # fmt: skip
STEPS = [
    {"extract": {"html": "resiliparse"}},
    "repair",
    {"language": {"keep": ["en", "de", "fr", "es", "ja", "ru", "zh"]}},
    {"filters": "gopher"},
    {"filters": "fineweb"},
    {"deduplicate": "exact"},
    {"deduplicate": {"method": "lines"}},
    {"deduplicate": {"method": "minhash", "threshold": 0.75}},
]
PAGES = ("*.html", "*.htm", "*.html.*", "*.xhtml")
READ, EXCERPT = 10, 700


def fetch(folder: Path) -> None:
    """Download and unpack what is not there yet."""
    archives, pages = folder / "debs", folder / "pages"
    archives.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not list(archives.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=archives, check=False, capture_output=True)
        for archive in archives.glob(f"{package}_*.deb"):
            place = pages / package
            if place.is_dir():
                continue
            place.mkdir(parents=True)
            unpack = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE)
            subprocess.run(
                ["tar", "-x", "-C", place, "--wildcards", *PAGES], stdin=unpack.stdout, check=False,
                capture_output=True,
            )  # fmt: skip
            unpack.wait()


def chosen(folder: Path, count: int) -> Path:
    """A folder of links to so many pages, those whose names hash lowest."""
    found = [path for path in (folder / "pages").rglob("*") if path.is_file() and not path.is_symlink()]
    found.sort(key=lambda path: hashlib.sha256(str(path.relative_to(folder)).encode()).hexdigest())
    place = folder / f"chosen-{count}"
    for path in found[:count]:
        to = place / path.relative_to(folder / "pages")
        # apache's pages end in their language: index.html.fr
        to = to if to.suffix in (".html", ".htm", ".xhtml") else to.with_name(f"{to.name}.html")
        if not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, to)
    print(f"{len(found):,} pages, {min(count, len(found)):,} of them curated")
    return place


def table(funnel: dict) -> list[str]:
    """The funnel as a table: documents in and out by step, and why."""
    rows = ["| step | in | out | left out because of |", "|---|---|---|---|"]
    for step in funnel["steps"]:
        read, kept = (sum(row[place] for row in step["sources"].values()) for place in (0, 2))
        rules = sorted(step["rules"].items(), key=lambda one: -one[1])
        why = ", ".join(f"{rule} {count:,}" for rule, count in rules)
        rows.append(f"| {step['title']} | {read:,} | {kept:,} | {why} |")
    return rows


def to_read(stage: Path, funnel: dict) -> list[str]:
    """Ten kept pages drawn at random, and ten of each rule."""
    kept = [row for path in sorted((stage / "data").glob("*.parquet"))
            for row in parquet.read_table(path, columns=["id", "text"]).to_pylist()]  # fmt: skip
    lines = ["# Kept"]
    for row in random.Random(0).sample(kept, min(READ, len(kept))):
        lines += [f"\n## {row['id']}\n", row["text"][:EXCERPT]]
    for step in funnel["steps"]:
        for rule, examples in step["examples"].items():
            lines.append(f"\n# {step['title']}: {rule} ({step['rules'][rule]:,})")
            for _, name, reason, text in examples[:READ]:
                lines += [f"\n## {name}: {reason}\n", text[:EXCERPT]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pages", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=1)
    wanted = parser.parse_args()
    folder = wanted.folder.absolute()
    fetch(folder)
    stage = {
        "kind": "curate", "data": str(chosen(folder, wanted.pages)), "steps": STEPS,
        "workers": wanted.workers,
    }  # fmt: skip
    recipe = folder / "debian.yaml"
    recipe.write_text(yaml.safe_dump({"name": "debian", "stages": {"web": stage}}, sort_keys=False))
    start = time.process_time()
    place = trivium.run(recipe, runs=folder / "runs")["web"].folder
    print(f"{time.process_time() - start:.0f} s of processor time")
    funnel = json.loads((place / "funnel.json").read_text())
    print("\n".join(table(funnel)))
    (folder / "read.md").write_text("\n".join(to_read(place, funnel)), errors="replace")


if __name__ == "__main__":
    main()
