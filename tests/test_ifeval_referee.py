"""IFEval's published checker, as lm-eval ships it, on the same answers; needs `lm-eval[ifeval]`."""

from __future__ import annotations

import sys
from collections import Counter
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from ifeval_answers import MAKERS, answers

from trivium.grade.ifeval import CHECKS

EACH = 24
NEEDS_NLTK_DATA = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}


def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """The registry of instructions, without the rest of lm-eval, whose import takes long."""
    spec = find_spec("lm_eval")
    if spec is None or not all(find_spec(name) for name in ("langdetect", "nltk", "immutabledict")):
        pytest.skip("IFEval's published checker is not installed: pip install 'lm-eval[ifeval]'")
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "tasks" / "ifeval"
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        package = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    for name in ("instructions_util", "instructions", "instructions_registry"):
        whole = f"lm_eval.tasks.ifeval.{name}"
        module_spec = spec_from_file_location(whole, folder / f"{name}.py")
        assert module_spec is not None
        assert module_spec.loader is not None
        module = module_from_spec(module_spec)
        monkeypatch.setitem(sys.modules, whole, module)
        monkeypatch.setattr(sys.modules["lm_eval.tasks.ifeval"], name, module, raising=False)
        module_spec.loader.exec_module(module)
    import langdetect

    langdetect.DetectorFactory.seed = 0
    return dict(module.INSTRUCTION_DICT)


def verdicts(registry: dict[str, type]) -> list[tuple[str, dict, str, bool, bool]]:
    """Instruction, arguments, answer, our verdict and the published one."""
    found = []
    for name, arguments, text in answers(seed=0, each=EACH):
        instruction = registry[name](name)
        instruction.build_description(**arguments)
        try:
            theirs = bool(text.strip() and instruction.check_following(text))
        except LookupError:  # tokenizers of nltk that are fetched apart
            assert name in NEEDS_NLTK_DATA
            continue
        found.append((name, arguments, text, CHECKS[name](text, **arguments), theirs))
    return found


def test_every_instruction_has_answers_on_both_sides() -> None:
    sides = Counter((name, CHECKS[name](text, **arguments)) for name, arguments, text in answers(0, EACH))
    assert MAKERS.keys() == CHECKS.keys()
    assert len(CHECKS) * EACH >= 500
    assert all(sides[name, followed] for name in CHECKS for followed in (True, False))


def test_the_published_checker_gives_the_same_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = verdicts(published(monkeypatch))
    unlike = [one for one in compared if one[3] != one[4]]
    assert len(compared) >= 500
    assert not unlike, f"{len(unlike)} of {len(compared)}: {Counter(one[0] for one in unlike)}\n{unlike[:5]}"
