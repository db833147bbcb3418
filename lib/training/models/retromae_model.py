"""RetroMAE pretraining (Xiao et al. 2022, arXiv 2205.12035, enhanced decoding) on the padding-free forward.

The encoder sees a text with 30 % of it masked; a decoder of one layer gets the text back from the encoder's first state
and, at each position, from a random half of the other tokens. Only the encoder is kept: `RetroMAE.network`.

As in the authors' code the decoder's keys are the encoder's first state and the embedded tokens after it, its queries that
state plus the positions, and a position never sees itself; see masking.py for what is hidden. Ours: a loss is the mean over
the positions of one text, where theirs averages over the tokens of a padded batch; the sum over texts can be cut into
chunks and ranks in any way. Words are also told for SentencePiece, where theirs takes single tokens.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...errors import ModelError
from ...models import self_test
from ...models.forward import PackedBatch, move, run_equal_length, run_packed
from ...models.load import load_network, position_start, quiet, vocabulary_size
from ...models.packing import Group, length_groups
from ...models.spec import ModelSpec
from .word_masking import SETS, Drawn, read_words

LOGITS = 2**26  # at a time: 256 MiB in float32; those of a batch would be tens of GiB with 250,000 tokens
SCORES = 2**24  # of attention at a time, for each head


class Decoder(nn.Module):
    """One layer of a transformer whose queries are not what it attends to. Sizes are those of the encoder's layers."""

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

    def forward(self, queries: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        """queries, seen: [texts, length, hidden]. mask: bool [texts, length, length], True where a query sees."""
        q, k, v = (
            layer(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, states in ((self.query, queries), (self.key, seen), (self.value, seen))
        )
        dropout = self.attention_dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], dropout_p=dropout)
        mixed = self.attended(mixed.transpose(1, 2).flatten(2))
        states = self.attended_norm(queries + self.dropout(mixed))
        return self.norm(states + self.dropout(self.narrow(functional.gelu(self.widen(states)))))


class RetroMAE(nn.Module):
    """Encoder, masked-language head and decoder of one pretraining; the head's matrix is the encoder's embeddings.

    network: what is kept, `network.save_pretrained(folder)`. words: for `draw`. padding_id: for `flatten`. mode: as
    Encoder's. fresh_head: weights of the head that the checkpoint did not have, so they are random.
    """

    def __init__(
        self, spec: ModelSpec, *, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        """Load and self-test (seconds), in evaluation mode. What is fresh comes from `seed`, the same on every rank.

        Raises ModelError for a model without a masked-language head of one module or without a table of positions.
        """
        super().__init__()
        self.network: Any = load_network(spec, dtype, device)
        embeddings = getattr(self.network, "embeddings", None)
        if not isinstance(getattr(embeddings, "position_embeddings", None), nn.Embedding):
            raise ModelError(f"{spec.name} ({spec.model_type}) has no table of positions. RetroMAE is for BERT's kind.")
        self.padding_id = position_start(self.network)
        self.words = read_words(spec, vocabulary_size(self.network))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head, self.fresh_head = _load_head(spec, self.network, dtype)
            self.decoder = Decoder(self.network.config)
        self.to(device=device, dtype=dtype)
        with torch.no_grad():
            self.mode = self_test.choose_mode(self.network, spec, self.padding_id, device)
        self.eval()

    def forward(self, batch: PackedBatch, drawn: Drawn) -> Tensor:
        """The sum of `losses`, float32 []: summed over chunks and divided by all texts of the global batch, a step's loss."""
        return self.losses(batch, drawn).sum()

    def losses(self, batch: PackedBatch, drawn: Drawn) -> Tensor:
        """Encoder loss + decoder loss of each text, each the mean over its positions: float32 [texts].

        batch: the texts as they are, each with its [CLS] or <s> first. drawn: what `draw` made of the same, in this order.
        A text without words has 0.
        """
        device = batch.ids.device
        states = self._encode(batch, move(drawn.ids, device))
        rebuilt = self.decode(states.index_select(0, batch.offsets[:-1]), batch, drawn)
        places, told = move(drawn.places, device), move(drawn.told, device)
        values = self._cross_entropy(
            torch.cat([states.index_select(0, places), rebuilt.index_select(0, told)]),
            batch.ids.index_select(0, torch.cat([places, told])),
        )
        texts, shares = zip(*(_shares(each, batch.borders) for each in (drawn.places, drawn.told)), strict=True)
        weighted = values * torch.from_numpy(np.concatenate(shares)).to(device)
        return values.new_zeros(len(batch.borders) - 1).index_add(0, move(np.concatenate(texts), device), weighted)

    def decode(self, heads: Tensor, batch: PackedBatch, drawn: Drawn) -> Tensor:
        """The decoder's states [tokens, hidden] from the texts' first states [texts, hidden] and the tokens shown."""
        table, device = self.network.embeddings, batch.ids.device
        text = move(np.repeat(np.arange(len(heads)), np.diff(batch.borders)), device)
        queries = table.position_embeddings(batch.positions) + heads.index_select(0, text)
        tokens = table(input_ids=batch.ids[None], position_ids=batch.positions[None])[0]
        seen = tokens.index_copy(0, batch.offsets[:-1], heads.to(tokens.dtype))
        hidden, choice, start, found = torch.from_numpy(drawn.hidden), move(drawn.choice, device), 0, []
        for group in length_groups(batch.borders):
            length, sets = group.length, min(group.length, SETS)
            for part in _parts(group):
                tokens_of = slice(part.start, part.start + part.count * length)
                end = start + part.count * sets * length
                out = hidden[start:end].to(device).view(part.count, sets, length)
                allowed = _allowed(out, choice[tokens_of].view(part.count, length))
                shape = (part.count, length, -1)
                found.append(self.decoder(queries[tokens_of].view(shape), seen[tokens_of].view(shape), allowed))
                start = end
        return torch.cat([states.flatten(0, 1) for states in found])

    def _encode(self, batch: PackedBatch, ids: Tensor) -> Tensor:
        """The network's states [tokens, hidden] of the texts with `ids` in place of theirs."""
        shown = PackedBatch(ids, batch.positions, batch.offsets, batch.borders)
        if self.mode == "packed":
            return run_packed(self.network, shown)
        ends = [int(np.searchsorted(batch.borders, g.start + g.count * g.length)) for g in length_groups(batch.borders)]
        starts = [0, *ends[:-1]]
        return torch.cat([run_equal_length(self.network, shown.part(*each)) for each in zip(starts, ends, strict=True)])

    def _cross_entropy(self, states: Tensor, targets: Tensor) -> Tensor:
        """Of each row [n, hidden]: float32 [n]. Logits are made again in the backward pass, a part at a time."""
        rows = max(1, LOGITS // len(self.words.special))
        parts = zip(states.split(rows), targets.split(rows), strict=True)
        return torch.cat(
            [checkpoint(self._part, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )

    def _part(self, states: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(states).float(), targets, reduction="none")


def _allowed(hidden: Tensor, choice: Tensor) -> Tensor:
    """Who sees whom, bool [texts, length, length], of sets [texts, sets, length] and the set of each position."""
    texts = torch.arange(len(choice), device=choice.device)[:, None]
    allowed = ~hidden[texts, choice]
    allowed.diagonal(dim1=1, dim2=2).fill_(False)
    allowed[:, :, 0] = True  # the encoder's state; of all others a text may hide each one
    return allowed


def _parts(group: Group) -> list[Group]:
    """The group's texts, as many at a time as SCORES allows."""
    texts = max(1, SCORES // group.length**2)
    return [
        Group(group.start + i * group.length, min(texts, group.count - i), group.length)
        for i in range(0, group.count, texts)
    ]


def _shares(places: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The text of each place, int64, and one over the number of places in it, float32: [places] each."""
    text = np.searchsorted(borders, places, side="right") - 1
    return text, np.asarray(1 / np.bincount(text, minlength=len(borders) - 1)[text], dtype=np.float32)


def _load_head(spec: ModelSpec, network: Any, dtype: torch.dtype) -> tuple[nn.Module, tuple[str, ...]]:
    """The head of the masked language model, on the embeddings of `network`, and its weights that the files lack."""
    from transformers import AutoModelForMaskedLM

    try:
        with quiet():
            whole, report = AutoModelForMaskedLM.from_pretrained(
                spec.folder, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # no such class for this model, or damaged weights
        raise ModelError(
            f"{spec.name} ({spec.model_type}) cannot be loaded as a masked language model, as RetroMAE needs it: "
            f"{type(error).__name__}: {error}"
        ) from error
    place = whole.base_model_prefix
    heads = [name for name, _ in whole.named_children() if name != place]
    if len(heads) != 1:
        raise ModelError(f"{type(whole).__name__} has {len(heads)} modules after its encoder; RetroMAE follows one.")
    setattr(whole, place, network)
    whole.tie_weights()
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(f"{place}."))
    return getattr(whole, heads[0]), tuple(missing)
