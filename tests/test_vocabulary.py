"""A vocabulary that grows keeps every old id, every old logit, and spells the new text in fewer tokens."""

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from trivium.kit.errors import TriviumError
from trivium.model.attention import Documents
from trivium.model.config import ModelConfig
from trivium.model.transformer import Transformer
from trivium.model.vocabulary import compression, grow_vocabulary, grown, old_pieces
from trivium.tokens.extend import extend_tokenizer, extended_backend
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import train_tokenizer

OLD = ["The miller of Dorn ground grain for the town.", "In spring the river rose and the miller slept."] * 20
NEW = ["волна шла к берегу и волна ушла", "берег ждал волну у старой воды", "вода шла к волне"] * 20


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Tokenizer, Tokenizer]:
    before = train_tokenizer(OLD, 330)
    return before, extend_tokenizer(before, NEW, 40)


def small_model(vocabulary: int, tied: bool) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocabulary=vocabulary, width=32, layers=2, heads=2, inner_width=48, context=64, tied=tied
    )
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_every_old_id_is_kept_and_control_tokens_do_not_move(tokenizers) -> None:
    before, after = tokenizers
    for identity in range(before.vocabulary_size):
        assert after.token(identity) == before.token(identity)
    assert after.control_ids == before.control_ids
    assert after.stop_ids == before.stop_ids
    assert after.vocabulary_size == before.vocabulary_size + 40


def test_old_text_is_spelt_as_before_and_new_text_shorter(tokenizers) -> None:
    before, after = tokenizers
    assert [after.encode(text) for text in OLD] == [before.encode(text) for text in OLD]
    report = compression(before, after, NEW)
    assert report.after > 2 * report.before
    assert all(after.decode(after.encode(text)) == text for text in NEW)


def test_the_extension_compresses_like_a_vocabulary_trained_from_nothing() -> None:
    """Starting from bytes alone, the merges must be worth what the tokenizers library's own trainer finds."""

    def bytes_only() -> Backend:
        backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return backend

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained = bytes_only()
    trained.train_from_iterator(
        NEW + OLD, trainers.BpeTrainer(vocab_size=256 + 50, initial_alphabet=alphabet, show_progress=False)
    )
    extended = extended_backend(bytes_only(), NEW + OLD, 50)

    def length(backend: Backend) -> int:
        return sum(len(backend.encode(text).ids) for text in NEW + OLD)

    assert extended.get_vocab_size() == trained.get_vocab_size()
    assert length(extended) == pytest.approx(length(trained), rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("start", ["mean", "random"])
def test_old_text_keeps_its_logits_over_old_ids(tokenizers, tied: bool, start: str) -> None:
    before, after = tokenizers
    model = small_model(before.vocabulary_size, tied)
    ids = torch.tensor(before.encode(OLD[0]))
    with torch.no_grad():
        old = model.logits(model(ids, Documents([len(ids)])))
        grow_vocabulary(model, before, after, start=start)
        new = model.logits(model(ids, Documents([len(ids)])))
    assert new.shape[-1] == after.vocabulary_size == model.config.vocabulary
    torch.testing.assert_close(new[:, : before.vocabulary_size], old, rtol=0, atol=1e-5)


def test_new_rows_are_the_mean_of_the_old_pieces(tokenizers) -> None:
    before, after = tokenizers
    model = small_model(before.vocabulary_size, tied=False)
    embedding, head = model.embedding.weight.detach().clone(), model.head.weight.detach().clone()
    grow_vocabulary(model, before, after)
    pieces = old_pieces(before, after)
    assert len(pieces) == 40
    for identity, parts in pieces.items():
        assert "".join(before.token(part) for part in parts) == after.token(identity)
        torch.testing.assert_close(model.embedding.weight[identity], embedding[parts].mean(0))
        torch.testing.assert_close(model.head.weight[identity], head[parts].mean(0))


def test_random_rows_have_the_mean_and_the_spread_of_the_old_ones() -> None:
    """Hewitt's advice (2021): drawn around the centre of the old embeddings, with their deviation."""
    old = 5.0 + torch.randn(7, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [0.1, 1.0, 2.0, 0.5]
    )
    pieces = {7: [0, 1], 8: [2]}
    found = grown(old, pieces, "random", torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(found[:7], old)
    for identity in pieces:
        drawn = torch.randn(4, generator=generator)
        torch.testing.assert_close(found[identity], old.mean(0) + old.std(0) * drawn)


def test_the_mean_start_takes_exactly_the_mass_of_the_old_pieces_mean(tokenizers) -> None:
    """By formula: a new logit is the mean of its old pieces', so what old ids lose follows from old logits.

    KL(old || new) = log(1 + sum of exp(new logits) / sum of exp(old logits)), and as exp is convex it is at
    most log(1 + the pieces' mean probability over all new tokens).
    """
    before, after = tokenizers
    model = small_model(before.vocabulary_size, tied=False)
    ids = torch.tensor(before.encode(OLD[1]))
    known = before.vocabulary_size
    with torch.no_grad():
        logits = model.logits(model(ids, Documents([len(ids)]))).double()
        grow_vocabulary(model, before, after)
        new = model.logits(model(ids, Documents([len(ids)]))).log_softmax(-1).double()
    old = logits.log_softmax(-1)
    pieces = old_pieces(before, after)
    means = torch.stack([logits[:, parts].mean(1) for parts in pieces.values()], 1)
    expected = torch.log1p(torch.exp(means).sum(1) / torch.exp(logits).sum(1))
    divergence = (old.exp() * (old - new[:, :known])).sum(-1)
    torch.testing.assert_close(divergence, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new[:, known:].exp().sum(1), -torch.expm1(-expected), rtol=1e-4, atol=1e-5)
    most = torch.stack([old[:, parts].exp().mean(1) for parts in pieces.values()], 1).sum(1)
    assert bool((divergence <= torch.log1p(most) + 1e-6).all())


def test_a_tokenizer_without_merges_is_refused() -> None:
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(TriviumError, match="WordLevel tokenizer cannot be extended"):
        extended_backend(backend, ["a b"], 5)
