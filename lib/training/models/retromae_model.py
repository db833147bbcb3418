"""RetroMAE pretraining (Xiao et al. 2022, arXiv 2205.12035, enhanced decoding) on the padding-free forward.

The encoder reads a text with 30 % of its tokens masked. A decoder of one layer reconstructs the text from the encoder's first
state and, at each position, a random half of the other tokens. Only the encoder is saved.

As in the authors' code the decoder's keys are the encoder's first state and the embedded tokens after it, its queries are that
state plus the position embeddings, and no position attends to itself; word_masking.py draws the masks. Two differences. A loss
is the mean over the positions of one text, where theirs averages over the tokens of a padded batch; so the sum over texts is the
same for any split into chunks and ranks. Whole words are also masked for SentencePiece, where theirs masks single tokens.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...errors import ModelError
from ...models.forward import PackedBatch, move
from ...models.load import quiet, vocabulary_size
from ...models.packing import Group, length_groups
from ...models.spec import ModelSpec
from .networks import Backbone
from .word_masking import SETS, Masks, draw_masks, read_word_vocabulary

LOGITS = 2**26  # computed at a time, 256 MiB in float32: all logits of a batch would be tens of GiB at 250,000 tokens
SCORES = 2**24  # attention scores computed at a time, for each head


class Decoder(nn.Module):
    """One transformer layer with separate inputs for queries and for keys and values. Sizes are those of the encoder's layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, wide = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attended, self.attended_norm = nn.Linear(width, width), nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.widen, self.narrow = nn.Linear(width, wide), nn.Linear(wide, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention_dropout = config.attention_probs_dropout_prob
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=config.initializer_range)
                nn.init.zeros_(layer.bias)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Output states. queries, context: [texts, length, hidden]. mask: bool [texts, length, length], True to attend."""
        q, k, v = (
            layer(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, states in ((self.query, queries), (self.key, context), (self.value, context))
        )
        dropout = self.attention_dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], dropout_p=dropout)
        mixed = self.attended(mixed.transpose(1, 2).flatten(2))
        states = self.attended_norm(queries + self.dropout(mixed))
        return self.norm(states + self.dropout(self.narrow(functional.gelu(self.widen(states)))))


class RetroMAE(nn.Module):
    """Encoder, masked-language head and decoder. The head's output matrix is tied to the encoder's embeddings."""

    def __init__(self, spec: ModelSpec, backbone: Backbone, seed: int = 0) -> None:
        """Load the head, and make the decoder. `seed` draws weights that the files lack, the same on every rank.

        Raises ModelError for a model without a masked-language head of one module or without a table of positions.
        """
        super().__init__()
        self.backbone = backbone
        network: Any = backbone.network
        if not isinstance(getattr(getattr(network, "embeddings", None), "position_embeddings", None), nn.Embedding):
            raise ModelError(f"{spec.name} ({spec.model_type}) has no table of positions. RetroMAE is for BERT's kind.")
        self.vocabulary = read_word_vocabulary(spec, vocabulary_size(network))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = _load_head(spec, network)
            self.decoder = Decoder(network.config)

    def forward(self, batch: PackedBatch) -> tuple[Tensor]:
        """The loss of each text, float32 [texts], under masks drawn from torch's generator, which the step seeds for dropout."""
        seeds = torch.randint(2**62, (len(batch.borders) - 1, 1)).numpy()
        return (self.losses(batch, draw_masks(batch.ids.cpu().numpy(), batch.borders, self.vocabulary, seeds)),)

    def losses(self, batch: PackedBatch, masks: Masks) -> Tensor:
        """Encoder loss + decoder loss of each text, each the mean over its targets: float32 [texts].

        batch: the unmasked texts, each beginning with [CLS] or <s>. masks: of the same texts, in this order. The loss of a
        text without words is 0.
        """
        device = batch.ids.device
        states = self.backbone(replace(batch, ids=move(masks.encoder_ids, device)))
        decoded = self.decode(states.index_select(0, batch.offsets[:-1]), batch, masks)
        targets = (masks.encoder_targets, masks.decoder_targets)
        of_encoder, of_decoder = (move(positions, device) for positions in targets)
        values = self._cross_entropy(
            torch.cat([states.index_select(0, of_encoder), decoded.index_select(0, of_decoder)]),
            batch.ids.index_select(0, torch.cat([of_encoder, of_decoder])),
        )
        texts, shares = zip(*(_shares(positions, batch.borders) for positions in targets), strict=True)
        weighted = values * torch.from_numpy(np.concatenate(shares)).to(device)
        return values.new_zeros(len(batch.borders) - 1).index_add(0, move(np.concatenate(texts), device), weighted)

    def decode(self, first_states: Tensor, batch: PackedBatch, masks: Masks) -> Tensor:
        """The decoder's states [tokens, hidden], from the texts' first encoder states, [texts, hidden], and visible tokens."""
        table: Any = self.backbone.network.embeddings
        device = batch.ids.device
        text = move(np.repeat(np.arange(len(first_states)), np.diff(batch.borders)), device)
        queries = table.position_embeddings(batch.positions) + first_states.index_select(0, text)
        tokens = table(input_ids=batch.ids[None], position_ids=batch.positions[None])[0]
        context = tokens.index_copy(0, batch.offsets[:-1], first_states.to(tokens.dtype))
        hidden, set_of_position = torch.from_numpy(masks.hidden), move(masks.set_of_position, device)
        start, outputs = 0, []
        for group in length_groups(batch.borders):
            length, sets = group.length, min(group.length, SETS)
            for part in _parts(group):
                span = slice(part.start, part.start + part.count * length)
                end = start + part.count * sets * length
                hidden_sets = hidden[start:end].to(device).view(part.count, sets, length)
                mask = _attention_mask(hidden_sets, set_of_position[span].view(part.count, length))
                shape = (part.count, length, -1)
                outputs.append(self.decoder(queries[span].view(shape), context[span].view(shape), mask))
                start = end
        return torch.cat([states.flatten(0, 1) for states in outputs])

    def _cross_entropy(self, states: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of each state [n, hidden], float32 [n]. The backward pass recomputes logits, a part at a time."""
        rows = max(1, LOGITS // len(self.vocabulary.special))
        parts = zip(states.split(rows), targets.split(rows), strict=True)
        return torch.cat(
            [checkpoint(self._part, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )

    def _part(self, states: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(states).float(), targets, reduction="none")


def _attention_mask(hidden: Tensor, set_of_position: Tensor) -> Tensor:
    """The decoder's attention mask, bool [texts, length, length], True to attend.

    hidden: bool [texts, sets, length]. set_of_position: int64 [texts, length].
    """
    texts = torch.arange(len(set_of_position), device=set_of_position.device)[:, None]
    mask = ~hidden[texts, set_of_position]
    mask.diagonal(dim1=1, dim2=2).fill_(False)
    mask[:, :, 0] = True  # the encoder's state: a set may hide every other position
    return mask


def _parts(group: Group) -> list[Group]:
    """Split a group of texts so that each part has at most SCORES attention scores, or one text."""
    texts = max(1, SCORES // group.length**2)
    return [
        Group(group.start + i * group.length, min(texts, group.count - i), group.length)
        for i in range(0, group.count, texts)
    ]


def _shares(positions: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The text of each position, int64, and its weight in the text's mean, float32: one over the text's positions."""
    text = np.searchsorted(borders, positions, side="right") - 1
    return text, np.asarray(1 / np.bincount(text, minlength=len(borders) - 1)[text], dtype=np.float32)


def _load_head(spec: ModelSpec, network: Any) -> nn.Module:
    """Load the masked-language head, tied to the embeddings of `network`. Weights that the files lack are random."""
    from transformers import AutoModelForMaskedLM

    try:
        with quiet():
            full = AutoModelForMaskedLM.from_pretrained(spec.folder, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # no such class for this model, or damaged weights
        raise ModelError(
            f"{spec.name} ({spec.model_type}) cannot be loaded as a masked language model, as RetroMAE needs it: "
            f"{type(error).__name__}: {error}"
        ) from error
    prefix = full.base_model_prefix
    heads = [name for name, _ in full.named_children() if name != prefix]
    if len(heads) != 1:
        raise ModelError(f"{type(full).__name__} has {len(heads)} modules after its encoder; RetroMAE follows one.")
    setattr(full, prefix, network)
    full.tie_weights()
    return getattr(full, heads[0])
