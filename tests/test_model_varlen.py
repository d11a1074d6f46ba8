"""A GPU's kernel for documents of several lengths: how it is called, and that it is reached in training."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from kernels import BY_VERSION, varlen_attn_of_2_10, varlen_attn_of_2_12
from small import small_model
from test_model_families import FAMILIES

from trivium.data.rows import collate, row_of_documents
from trivium.evals.likelihood import log_likelihoods
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.precision import one_pass
from trivium.model import attention, branches, varlen
from trivium.model.attention import Documents, Scoring, borders_of
from trivium.model.branches import Branches
from trivium.model.families import read_config
from trivium.model.initialise import new_model
from trivium.model.transformer import Transformer
from trivium.model.varlen import VarlenKernel, varlen_kernel

# Torch has the kernel from 2.10 on.
varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn

LENGTHS = (5, 30, 17, 1)
USED = [version for version in BY_VERSION if version not in ("2.9", "2.10")]


class Counting:
    """A kernel's function that counts its calls, under the signature of the one it stands for."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0
        self.__signature__ = inspect.signature(function)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self.function(*arguments, **options)


def install(monkeypatch: pytest.MonkeyPatch, function: Any) -> Counting:
    """Let a CPU have a kernel, as a GPU has, found by the same look at its signature."""
    counting = Counting(function)
    kernel = VarlenKernel.of(counting)
    for module in (attention, branches):
        monkeypatch.setattr(module, "varlen_kernel", lambda device: kernel)
    return counting


def test_the_signatures_in_these_tests_are_torchs_own() -> None:
    def shape(function: Any) -> list[tuple[str, Any, Any]]:
        return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]

    ours = BY_VERSION[".".join(torch.__version__.split(".")[:2])]
    assert shape(varlen_attn) == shape(ours)


def test_the_installed_kernel_takes_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real function, forward and backward, on tensors without content: arguments, types and shapes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernel = varlen_kernel.__wrapped__(torch.device("cuda"))
    assert kernel is not None
    for heads, key_heads in ((4, 4), (4, 2)):
        query = torch.empty(53, heads, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(60, key_heads, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
        borders = tuple(torch.empty(17, dtype=torch.int32, device="meta") for _ in range(2))
        for window in (None, 7):
            out = kernel(query, key, key, borders, (32, 64), scale=0.3, window=window)
            assert (out.shape, out.dtype) == (query.shape, torch.bfloat16)
            out.sum().backward()
            assert key.grad.shape == key.shape


DESIGNS: list[dict[str, Any]] = [
    {},
    {"key_value_heads": 1},
    {"windows": (6, None)},
    {"windows": (3, 17), "key_value_heads": 1},
]


@pytest.mark.parametrize("version", USED)
@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_it_computes_what_the_groups_compute(monkeypatch, version: str, design: dict) -> None:
    found = []
    for kernel in (False, True):
        model = small_model(**design)
        with monkeypatch.context() as patch:
            counting = install(patch, BY_VERSION[version]) if kernel else None
            row = row_of_documents([np.arange(length) * 7 % 61 for length in LENGTHS])
            with one_pass("bfloat16", model.device):
                loss = NextToken().loss(model, collate([row])).sum
            loss.backward()
            assert counting is None or counting.calls == 2, "both layers reach it"
        found.append((loss, torch.cat([one.grad.flatten() for one in model.parameters()])))
    torch.testing.assert_close(found[0][0], found[1][0], atol=0, rtol=2e-3)
    assert torch.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.9995


@pytest.mark.parametrize("version", USED)
@pytest.mark.parametrize("window", [None, 1, 4, 20])
def test_branches_see_their_beginning_and_themselves(monkeypatch, version: str, window: int | None) -> None:
    lengths, back = [9, 4, 11, 1, 17, 20, 2], [0, 1, 2, 3, 0, 1, 2]
    torch.manual_seed(0)
    rows = [torch.randn(sum(lengths), heads, 16) for heads in (4, 2, 2)]
    outputs, gradients = [], []
    for kernel in (False, True):
        leaves = [part.clone().requires_grad_() for part in rows]
        with monkeypatch.context() as patch, one_pass("bfloat16", torch.device("cpu")):
            counting = install(patch, BY_VERSION[version]) if kernel else None
            out = Branches(lengths, back).attend(0, *leaves, Scoring(0.25, window))
            assert counting is None or counting.calls == 1
        out.float().square().sum().backward()
        outputs.append(out)
        gradients.append(torch.cat([leaf.grad.flatten() for leaf in leaves]))
    torch.testing.assert_close(*outputs, atol=0.02, rtol=0.02)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9995


def tiny(name: str) -> Transformer:
    config_class, arguments = FAMILIES[name]
    content = getattr(transformers, config_class)(**arguments).to_dict()
    config = read_config({**content, "architectures": [config_class.replace("Config", "ForCausalLM")]}, name)
    return new_model(config)


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_in_bfloat16_reaches_it_in_every_layer_of_every_family(monkeypatch, caplog, name) -> None:
    """Queries and keys come out of norms and rotations in float32, which the kernel would not take."""
    monkeypatch.setattr(varlen, "_said", set())
    counting = install(monkeypatch, varlen_attn_of_2_12)
    model = tiny(name)
    row = row_of_documents([torch.arange(3, 3 + length).numpy() for length in LENGTHS])
    with one_pass("bfloat16", model.device):
        NextToken().loss(model, collate([row])).sum.backward()
    reaches = model.config.attention_soft_cap is None and model.config.head_width % 8 == 0
    assert counting.calls == (model.config.layers if reaches else 0)
    said = [record for record in caplog.records if record.name == "trivium.model"]
    assert len(said) == (0 if reaches else 1), "a slower way is said, once"


def test_uniform_documents_take_the_fused_kernels_for_whole_rows(monkeypatch) -> None:
    """Which are faster, unless a window would need a mask."""
    counting = install(monkeypatch, varlen_attn_of_2_12)
    rows = [torch.randn(24, 2, 16).bfloat16() for _ in range(3)]
    Documents([12, 12]).attend(0, *rows, Scoring(0.25))
    assert counting.calls == 0
    Documents([12, 12]).attend(0, *rows, Scoring(0.25, 5))
    assert counting.calls == 1


def test_trees_of_continuations_are_no_plain_documents(monkeypatch) -> None:
    """What shares a prompt in an evaluation sees its own branch alone, on a GPU as well."""
    counting = install(monkeypatch, varlen_attn_of_2_12)
    model = small_model().to(torch.bfloat16)
    prompts, endings = [[1, 2, 3, 4], [1, 2, 3, 4], [7, 8]], [[5, 6], [9], [5]]
    together = log_likelihoods(model, prompts, endings)
    alone = [
        log_likelihoods(model, [prompt], [ending])[0] for prompt, ending in zip(prompts, endings, strict=True)
    ]
    assert counting.calls == 0
    assert [one.total for one in together] == pytest.approx([one.total for one in alone], abs=0.05)


def test_borders_have_few_shapes_and_end_in_documents_without_a_token() -> None:
    borders = borders_of(torch.tensor([3, 5]), torch.device("cpu"))
    assert borders.tolist() == [0, 3] + [8] * 15
    shapes = {
        len(borders_of(torch.ones(count, dtype=torch.long), torch.device("cpu"))) for count in range(1, 200)
    }
    assert shapes == {17, 33, 65, 129, 257}


def test_what_a_machine_lacks_is_said_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(varlen, "_said", set())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    capability = {"now": (7, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["now"])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert varlen_kernel.__wrapped__(torch.device("cuda")) is None
        assert [record.message for record in caplog.records] == [
            "attention is slower than it could be: Tesla V100 is older than the kernel, which needs an A100."
        ]
        capability["now"] = (8, 0)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn_of_2_10)
        assert varlen_kernel.__wrapped__(torch.device("cuda")) is None
        assert "takes no scale or no window" in caplog.records[-1].message
        monkeypatch.setitem(__import__("sys").modules, "torch.nn.attention.varlen", None)
        assert varlen_kernel.__wrapped__(torch.device("cuda")) is None
        assert "has no varlen_attn" in caplog.records[-1].message
    assert varlen_kernel(torch.device("cpu")) is None
    assert len(caplog.records) == 3
