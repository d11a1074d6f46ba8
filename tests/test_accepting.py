"""A change of code that cannot matter: the earlier result stands for it, because a person said so."""

from __future__ import annotations

import pytest
from toys import ToyTrain, write_recipe

from trivium.cli import main
from trivium.kit.errors import DamagedError, TriviumError
from trivium.pipeline.accepted import acceptances
from trivium.pipeline.run import run
from trivium.pipeline.why import accept


def test_an_accepted_result_serves_its_children_and_is_recorded(tmp_path, monkeypatch, capsys):
    path, runs = write_recipe(tmp_path), tmp_path / "runs"
    before = run(path, runs)
    monkeypatch.setattr(ToyTrain, "version", 2)
    main(["accept", str(path), "base", "--because", "only a comment moved", "--runs", str(runs)])
    assert "stands for base-" in capsys.readouterr().out
    prepared = run(path, runs, only=["base"])
    assert prepared.became == {"words": "reused", "base": "reused"}
    assert prepared.entry("base").folder == before.entry("base").folder
    (said,) = acceptances(runs / "store").values()
    assert said["because"] == "only a comment moved"
    assert said["differences"] == ["the stage's own version: 1 -> 2"]
    # What hangs below is itself of other code; once accepted, all is as it was.
    accept(path, "left", "the same", runs)
    assert run(path, runs).became == {"words": "reused", "base": "reused", "left": "reused", "right": "ran"}
    assert "there is nothing to accept" in accept(path, "left", "again", runs)


def test_only_a_change_of_code_is_accepted(tmp_path, monkeypatch):
    path, runs = write_recipe(tmp_path), tmp_path / "runs"
    with pytest.raises(TriviumError, match="base has no finished result of toy"):
        accept(path, "base", "why not", runs)
    run(path, runs)
    monkeypatch.setattr(ToyTrain, "version", 2)
    for override, sentence in [
        ("base.steps=5", r"more than code \(steps: 4 -> 5\)"),
        ("words.vocabulary=9", r"more than code \(words is another result: words-\w+ -> words-\w+\)"),
    ]:
        with pytest.raises(TriviumError, match=sentence):
            accept(path, "base", "why not", runs, [override])
    with pytest.raises(TriviumError, match="--because is empty"):
        accept(path, "base", " ", runs)
    with pytest.raises(TriviumError, match="no stage `zzz`"):
        accept(path, "zzz", "why not", runs)
    assert acceptances(runs / "store") == {}
    accept(path, "base", "why not", runs)
    place = runs / "store" / "accepted.json"
    place.write_text(place.read_text().replace("why not", "why so"))
    with pytest.raises(DamagedError, match=r"accepted\.json is damaged"):
        run(path, runs)
