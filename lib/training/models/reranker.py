"""What is trained when the loss is of scores: a classifier of pairs, or a language model and the logits of its answers."""

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...models.forward import PackedBatch
from ...models.load import quiet
from ...models.reranker import Picker, Reranker
from ...models.reranker_spec import SPEC_FILE, RerankSpec
from ...models.score_heads import Classifier, load_classifier
from ...models.spec import on_this_machine
from ..step.grad_cache import AccumulatingStep
from ..step.trainable import Adapters, Inputs, LoadedModel, Texts, adapted, merged
from .export import SHARD, copy_tokenizer, write_json
from .networks import Backbone, full_precision

ACTIVATIONS = {"none": "torch.nn.modules.linear.Identity", "sigmoid": "torch.nn.modules.activation.Sigmoid"}


class ScoreNetwork(nn.Module):
    """A reranker: raw scores of pairs, float32 [n]."""

    def __init__(self, backbone: Backbone, head: nn.Module, pick: Picker) -> None:
        super().__init__()
        self.backbone, self.head, self.pick = backbone, head, pick

    def forward(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        states = self.backbone(batch)
        with full_precision(states):
            return (self.head(self.pick(states, batch.offsets)),)


@dataclass(frozen=True)
class PairScorer:
    """spec: the model and how pairs go through it."""

    spec: RerankSpec
    adapters: Adapters | None = None

    def here(self) -> "PairScorer":
        return replace(self, spec=replace(self.spec, model=on_this_machine(self.spec.model)))

    def texts(self) -> "PairTexts":
        return PairTexts(self.spec)

    def load(self, device: torch.device) -> LoadedModel:
        """The network as our reranker loads and tests it. Raises ModelError."""
        loaded = Reranker(self.spec, dtype="float32", device=str(device)).parts()
        network: Any = loaded.network
        if getattr(network, "pooler", None) is not None:
            network.pooler = None  # the head has a copy, which is the one that scores
        if self.spec.answers:  # the rows of the answers are read from the output matrix, which may be these
            network.get_input_embeddings().requires_grad_(False)
        backbone = Backbone(adapted(network, self.adapters), loaded.mode)
        return LoadedModel(ScoreNetwork(backbone, loaded.head, loaded.pick), backbone, loaded.padding_id)

    def step(self) -> Any:
        return lambda network, loss, cutter, autocast, sharpness: AccumulatingStep(network, loss, cutter, autocast)

    def save(self, network: ScoreNetwork, folder: Path) -> None:
        """Write the directory that CrossEncoder, transformers and our own jobs load."""
        folder.mkdir(parents=True, exist_ok=True)
        backbone = merged(network.backbone.network)
        whole = (
            self._language_model()
            if self.spec.answers
            else load_classifier(self.spec.model.folder, torch.float32, torch.device("cpu"))
        )
        base = getattr(whole, whole.base_model_prefix)
        strange = base.load_state_dict(backbone.state_dict(), strict=False)
        if strange.unexpected_keys or any("pooler" not in name for name in strange.missing_keys):
            raise ModelError(f"{self.spec.model.name} cannot be put together again: {strange}. Shoal does not train it")
        if isinstance(network.head, Classifier):
            _copy_head(network.head, whole)
            whole.config.sentence_transformers = {"activation_fn": ACTIVATIONS[self.spec.activation]}
        with quiet():
            whole.save_pretrained(folder, max_shard_size=SHARD)
        copy_tokenizer(self.spec.model, folder)
        if self.spec.segments and not self.spec.answers:
            said = {name: getattr(self.spec, name) for name in ("segments", "beyond", "activation")}
            write_json(folder / SPEC_FILE, said | {"max_tokens": self.spec.model.max_tokens})

    def _language_model(self) -> Any:
        from transformers import AutoModelForCausalLM

        with quiet():
            return AutoModelForCausalLM.from_pretrained(self.spec.model.folder, dtype=torch.float32)


class PairTexts(Texts):
    """Rows of the plan as tokens of pairs, [b * g], row by row."""

    def __init__(self, spec: RerankSpec) -> None:
        self._format = spec.pair_format()
        self._kinds = not spec.segments

    def __call__(self, rows: pa.Table) -> Inputs:
        passages = rows["passages"].to_pylist()
        queries = [[query] * len(each) for query, each in zip(rows["query"].to_pylist(), passages, strict=True)]
        pairs = self._format(list(chain.from_iterable(queries)), list(chain.from_iterable(passages)))
        if not self._kinds:
            return Inputs(pairs.tokens)
        lengths = np.diff(pairs.tokens.offsets)
        place = np.arange(len(pairs.tokens.ids)) - np.repeat(pairs.tokens.offsets[:-1], lengths)
        return Inputs(pairs.tokens, (place >= np.repeat(pairs.second, lengths)).astype(np.int64))


def _copy_head(head: Classifier, whole: Any) -> None:
    """Put what was trained beside the backbone back into a whole classifier."""
    prefix = f"{whole.base_model_prefix}."
    state = {name: value for name, value in head.network.state_dict().items() if not name.startswith(prefix)}
    whole.load_state_dict(state, strict=False)
    if head.stand_in.pooler is not None:
        getattr(whole, whole.base_model_prefix).pooler.load_state_dict(head.stand_in.pooler.state_dict())
