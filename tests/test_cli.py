"""The verbs: one sentence and status 2 for what a person can mend, and no heavy import for help."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import toys  # noqa: F401
from click.testing import CliRunner
from toys import write_recipe

from trivium.cli import cli, main
from trivium.recipe.schema import load


def words(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]


def test_help_imports_nothing_heavy():
    program = (
        "import sys, trivium\n"
        "from trivium.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'rich', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RECIPE" in done.stdout


@pytest.mark.parametrize("verb", sorted(cli.commands))
def test_every_verb_explains_itself(verb):
    result = CliRunner().invoke(cli, [verb, "--help"])
    assert result.exit_code == 0
    assert cli.commands[verb].help


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nothing.yaml"], "There is no recipe `nothing.yaml`"),
        (["plan", "{recipe}", "--set", "base.stepps=1"], "did you mean `steps`?"),
        (["plan", "{folder}/toy.yml"], "toy.yaml`?"),
        (["plan", "experiments/replai"], "did you mean `experiments/replay`?"),
        (["plan", "0"], "it has laptop, pocket, and in experiments/ anneal, "),
        (["show", "base", "--runs", "{folder}/runs"], "No stage `base`"),
        (["show", "toy/base", "--runs", "{folder}/runs"], "; start with `trivium run`"),
        (["run", "{recipe}", "--only", "bse"], "did you mean `base`?"),
        (["gc", "--runs", "{folder}/nowhere"], "there is no folder"),
        (["launch", "{recipe}", "--on", "moon"], "'moon' is not one of"),
        (["runn", "x"], "there is no verb `runn`; did you mean `trivium run`?"),
        (
            ["launch", "{recipe}", "--on", "torchrun", "--nodes", "2"],
            "torchrun starts the processes of one machine",
        ),
        (["launch", "{recipe}", "--on", "slurm", "--nodes", "0"], "0 is not in the range"),
        (["watch", "--port", "70000"], "70000 is not in the range"),
        (["schema", "--to", "{recipe}/schema.json"], "toy.yaml/schema.json cannot be written"),
        (["init", "{recipe}/mine.yaml"], "toy.yaml/mine.yaml cannot be written"),
        (["chat", "~nobody-of-that-name/x"], "~nobody-of-that-name/x is neither"),
        (["run", "~nobody-of-that-name/x"], "There is no recipe `~nobody-of-that-name/x`"),
        (["plan", "{recipe}", "--set", "base.steps=1e400k"], "base.steps cannot be"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(tmp_path, capsys, arguments, said):
    recipe = write_recipe(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(recipe=recipe, folder=tmp_path) for argument in arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("option", "said"), [("--against", "no.json is missing"), ("--json", "is a folder; name a file")]
)
def test_an_evaluation_asks_nothing_before_it_knows_where_to(tmp_path, capsys, monkeypatch, option, said):
    def asked(*given, **settings):
        raise AssertionError("minutes of asking, for nothing")

    monkeypatch.setattr("trivium.evals.evaluate.evaluate_folder", asked)
    place = tmp_path if option == "--json" else tmp_path / "no.json"
    with pytest.raises(SystemExit):
        main(words("eval", tmp_path, "--tasks", "facts", option, place))
    assert said in capsys.readouterr().err


def test_a_run_ends_with_a_table(tmp_path, capsys):
    main(words("run", write_recipe(tmp_path), "--runs", tmp_path / "runs"))
    lines = capsys.readouterr().out.splitlines()
    heads = [word for line in lines if line.startswith("stage") for word in line.split()]
    assert set(heads) == {"stage", "tokens", "loss", "time", "where"}
    base = [line.split() for line in lines if line.startswith("base")]
    assert base[0][:4] == ["base", "ran", "4k", "0.250"]
    assert base[-1][-1] == str(tmp_path / "runs" / "toy" / "base")


def test_status_and_show_and_plan_print(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    main(words("run", recipe, "--runs", tmp_path / "runs"))
    main(words("status", "--runs", tmp_path / "runs"))
    main(words("show", "base", "--runs", tmp_path / "runs", "--step", 2))
    main(words("plan", recipe, "--runs", tmp_path / "runs"))
    printed = capsys.readouterr().out
    assert "└ base" in printed
    assert "doc-7-2" in printed
    assert "reuse" in printed


def test_init_writes_a_recipe_that_loads_and_never_overwrites(tmp_path, capsys):
    main(words("init", tmp_path / "mine.yaml"))
    assert set(load(tmp_path / "mine.yaml").stages) == {"words", "corpus", "base", "sft"}
    with pytest.raises(SystemExit):
        main(words("init", tmp_path / "mine.yaml"))
    assert "is there already" in capsys.readouterr().err


def test_schema(tmp_path, capsys):
    main(words("schema", "--to", tmp_path / "schema.json"))
    assert "toy_train" in json.dumps(json.loads((tmp_path / "schema.json").read_text()))


@pytest.mark.parametrize("target", ["torchrun", "slurm", "sky", "ray"])
def test_launch_renders_a_script(tmp_path, capsys, target):
    recipe = write_recipe(tmp_path)
    machines = ["--nodes", 2] if target in ("slurm", "sky") else []
    main(words("launch", recipe, "--on", target, "--processes", 4, *machines, "--print", "--runs", "/runs"))
    script = capsys.readouterr().out
    assert f"-m trivium.cli run {recipe} --runs /runs" in script
    assert "4" in script
    if target != "sky":
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_name_with_a_space_stays_one_word_of_the_script(tmp_path, capsys):
    folder = tmp_path / "my texts"
    folder.mkdir()
    recipe = write_recipe(folder)
    main(words("launch", recipe, "--on", "torchrun", "--runs", folder / "runs", "--print"))
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(line)[-3:] == [str(recipe), "--runs", str(folder / "runs")]


@pytest.mark.slow
def test_doctor_measures(tmp_path, capsys, monkeypatch):
    main(words("doctor", "--runs", tmp_path))
    printed = capsys.readouterr().out
    for name in ("processor", "memory", "computes on", "matrix peak", "memory bandwidth", "disk"):
        assert name in printed
