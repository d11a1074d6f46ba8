"""The decoder: a flat list of tokens in, their hidden states out."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trivium.model.arithmetic import note_pass, note_product
from trivium.model.attention import Context, Scoring
from trivium.model.config import ModelConfig
from trivium.model.experts import Mixture, Routing
from trivium.model.layers import Inner, make_norm
from trivium.model.operations import in_product_type, multiply, project, rotate
from trivium.model.positions import Rotary
from trivium.model.recompute import Recompute, run

if TYPE_CHECKING:
    from trivium.model.modalities.towers import Modalities

Angles = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Project to queries, keys and values, turn them by their positions, and let the context mix them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_width = config.head_width
        self.scoring = Scoring(config.score_scale, config.window(layer), config.attention_soft_cap)
        self.rotates = config.rotates_at(layer)
        self.norm_kind = config.query_key_norm
        query_width = config.heads * config.head_width
        key_width = config.key_value_heads * config.head_width
        bias = config.query_key_value_bias
        self.query = nn.Linear(config.width, query_width, bias=bias)
        self.key = nn.Linear(config.width, key_width, bias=bias)
        self.value = nn.Linear(config.width, key_width, bias=bias)
        self.output = nn.Linear(query_width, config.width, bias=config.attention_output_bias)
        if self.norm_kind != "none":
            per_head = self.norm_kind == "head"
            self.query_norm = make_norm(config, config.head_width if per_head else query_width)
            self.key_norm = make_norm(config, config.head_width if per_head else key_width)

    def forward(self, rows: Tensor, context: Context, angles: Angles | None, wanted: Tensor | None) -> Tensor:
        query, key, value = project(rows, self.query, self.key, self.value)
        if self.norm_kind == "full":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (part.unflatten(-1, (-1, self.head_width)) for part in (query, key, value))
        if self.norm_kind == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None and self.rotates:
            query, key = rotate(query, *angles), rotate(key, *angles)
        mixed = context.attend(self.layer, query, key, value, self.scoring).flatten(-2)
        return multiply(mixed if wanted is None else mixed[wanted], self.output)[0]


class Layer(nn.Module):
    """Attention, then the inner network, each added to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        if config.experts is not None and config.is_mixture(layer):
            self.mlp: Mixture | Inner = Mixture(config, config.experts)
        else:
            self.mlp = Inner(config, config.inner_width)
        width, self.residual_scale = config.width, config.residual_scale
        self.attention_norm = make_norm(config, width) if config.norm_before else None
        self.mlp_norm = make_norm(config, width) if config.norm_before else None
        self.attention_post_norm = make_norm(config, width) if config.norm_after else None
        self.mlp_post_norm = make_norm(config, width) if config.norm_after else None

    def forward(
        self,
        stream: Tensor,
        context: Context,
        angles: Angles | None,
        routing: Routing | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        rows = stream if self.attention_norm is None else self.attention_norm(stream)
        rows = self.attention(rows, context, angles, wanted)
        stream = stream if wanted is None else stream[wanted]
        rows = rows if self.attention_post_norm is None else self.attention_post_norm(rows)
        stream = stream + (rows if self.residual_scale == 1.0 else rows * self.residual_scale)
        rows = stream if self.mlp_norm is None else self.mlp_norm(stream)
        rows = self.mlp(rows, routing) if isinstance(self.mlp, Mixture) else self.mlp(rows)
        rows = rows if self.mlp_post_norm is None else self.mlp_post_norm(rows)
        return stream + (rows if self.residual_scale == 1.0 else rows * self.residual_scale)


def make_table(rows: int, width: int) -> nn.Embedding:
    """An embedding; one without numbers draws none, for which torch would import its compiler."""
    weight = torch.empty(rows, width)
    return nn.Embedding(rows, width, _weight=weight if weight.is_meta else nn.init.normal_(weight))


class Transformer(nn.Module):
    """A decoder over a flat list of tokens; the context alone knows which of them belong together."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute: Recompute = "none"
        self.run_layer: Callable[..., Tensor] = run
        self.modalities: Modalities | None = None
        self.embedding = make_table(config.vocabulary, config.width)
        self.position_embedding = (
            make_table(config.context, config.width) if config.positions == "learned" else None
        )
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config, config.width)
        self.head = None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)
        self.rotary = self.local_rotary = None
        if config.positions == "rope":
            self.rotary = Rotary(config.rope, config.head_width, config.context)
        if config.local_rope is not None:
            self.local_rotary = Rotary(config.local_rope, config.head_width, config.context)

    def embed(self, tokens: Tensor) -> Tensor:
        """The vectors of these tokens before the first layer, without positions: [N, width].

        Ids of pictures and sounds (`tokens.items`) become the rows of their projector."""
        if self.modalities is not None and (found := self.modalities.places(tokens)) is not None:
            places, rows = found
            text = self.embed_text(tokens.index_fill(0, places, 0))
            return text.index_copy(0, places, rows.to(text.dtype))
        return self.embed_text(tokens)

    def embed_text(self, tokens: Tensor) -> Tensor:
        """The vectors of tokens of the vocabulary, [N, width]."""
        rows = self.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            # Gemma rounds the scale to the weights' precision; on the CPU, so that no step copies it anew.
            rows = rows * torch.tensor(self.config.embedding_scale, dtype=rows.dtype, device="cpu")
        return rows

    def forward(
        self, tokens: Tensor, context: Context,
        *, embeddings: Tensor | None = None, noise: Tensor | None = None, routing: Routing | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states after the last norm, [N, width], for N tokens or N ready-made embeddings.

        `noise`, [N, width], is added to the embeddings. A `routing` is filled with what the routers of a
        mixture of experts did. With `wanted`, only states at these places come back, and the last layer
        computes no others."""
        note_pass(self, len(tokens), context, None if wanted is None else len(wanted))
        stream = self.embed(tokens) if embeddings is None else embeddings
        if noise is not None:
            stream = stream + noise
        if self.position_embedding is not None:
            stream = stream + self.position_embedding(context.positions)
        angles = local_angles = None
        if self.rotary is not None:
            angles = local_angles = self.rotary(context.positions, context.longest, self.dtype)
        if self.local_rotary is not None:
            local_angles = self.local_rotary(context.positions, context.longest, self.dtype)
        # Between products everything is limited by memory: half the bytes. Norms compute in float32 inside.
        (stream,) = in_product_type(stream)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            local = layer.attention.scoring.window is not None
            last = layer.attention.layer == len(self.layers) - 1
            stream = self.run_layer(
                layer, self.recompute,
                stream, context, local_angles if local else angles, routing, wanted if last else None,
            )  # fmt: skip
        hidden = self.norm(stream).to(stream.dtype)
        # Whoever multiplies these with the head, in chunks or at once, has the family's scores.
        return hidden if self.config.logit_divisor == 1.0 else hidden / self.config.logit_divisor

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary in float32."""
        note_product(hidden.numel() // hidden.shape[-1], self.head_weight, _passes(hidden, self.head_weight))
        scores = torch.nn.functional.linear(hidden, self.head_weight).float()
        cap = self.config.final_soft_cap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    @property
    def head_weight(self) -> Tensor:
        """The matrix that turns hidden states into scores: [vocabulary, width]."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def final_soft_cap(self) -> float | None:
        """The limit of the scores, in families that have one."""
        return self.config.final_soft_cap

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype


def hidden_at(
    model: Transformer, tokens: Tensor, context: Context, places: Tensor, routing: Routing | None = None
) -> Tensor:
    """The hidden states at these places, [places, width]; routers of experts are given all tokens."""
    if model.config.experts is None:
        return model(tokens, context, wanted=places)
    return model(tokens, context, routing=routing)[places]


def _passes(*factors: Tensor) -> int:
    """How many products a product of two becomes: itself, and one for the gradient of each."""
    return 1 + sum(one.requires_grad for one in factors) * torch.is_grad_enabled()
