"""Train a reranker: a classifier of pairs, or a language model that scores by the logits of its answers."""

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
from ...models.packing import positions_of
from ...models.reranker import Picker, Reranker
from ...models.reranker_spec import SPEC_FILE, RerankSpec
from ...models.score_heads import Classifier, load_classifier
from ..step.grad_cache import AccumulatingStep
from ..step.trainable import Adapters, Inputs, LoadedModel, add_adapters, merge_adapters
from .export import WEIGHT_FILE_SIZE, copy_tokenizer, write_json
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
            return (self.head(self.pick(states, batch)),)


@dataclass(frozen=True)
class RerankerTrainable:
    """A reranker to train. spec: the model and the format of its pairs."""

    spec: RerankSpec
    adapters: Adapters | None = None

    def on_this_machine(self) -> "RerankerTrainable":
        return replace(self, spec=self.spec.on_this_machine())

    def row_tokenizer(self) -> "PairRowTokenizer":
        return PairRowTokenizer(self.spec)

    def load(self, device: torch.device) -> LoadedModel:
        """Load and self-test the network as a job's reranker does. Raises ModelError."""
        loaded = Reranker(self.spec, dtype="float32", device=str(device))
        network: Any = loaded.network
        if getattr(network, "pooler", None) is not None:
            network.pooler = None  # unused: scores come from the head's own copy of it
        if self.spec.answers:  # the head reads their rows of the output matrix, which may be tied to the embeddings
            network.get_input_embeddings().requires_grad_(False)
        mode = "packed" if loaded.mode == "shared" else loaded.mode  # training shares no prefixes
        backbone = Backbone(add_adapters(network, self.adapters), mode)
        return LoadedModel(ScoreNetwork(backbone, loaded.head, loaded.pick), backbone, loaded.padding_id)

    def step_factory(self) -> Any:
        return lambda network, loss, chunker, autocast, logit_scale: AccumulatingStep(network, loss, chunker, autocast)

    def save(self, network: ScoreNetwork, folder: Path) -> None:
        """Write a model directory that CrossEncoder, transformers and our own jobs load."""
        folder.mkdir(parents=True, exist_ok=True)
        backbone = merge_adapters(network.backbone.network)
        full = self._load_full_model()
        base = getattr(full, full.base_model_prefix)
        mismatch = base.load_state_dict(backbone.state_dict(), strict=False)
        if mismatch.unexpected_keys or any("pooler" not in name for name in mismatch.missing_keys):
            what = f"{self.spec.model.name} cannot be put together again"
            raise ModelError(f"{what}: {mismatch}. Shoal does not train it")
        if isinstance(network.head, Classifier):
            _copy_head(network.head, full)
            full.config.sentence_transformers = {"activation_fn": ACTIVATIONS[self.spec.activation]}
        with quiet():
            full.save_pretrained(folder, max_shard_size=WEIGHT_FILE_SIZE)
        copy_tokenizer(self.spec.model, folder)
        if self.spec.segments and not self.spec.answers:
            options = {name: getattr(self.spec, name) for name in ("segments", "beyond", "activation")}
            write_json(folder / SPEC_FILE, options | {"max_tokens": self.spec.model.max_tokens})

    def _load_full_model(self) -> Any:
        """The model with its original head, on the CPU."""
        from transformers import AutoModelForCausalLM

        if not self.spec.answers:
            return load_classifier(self.spec.model.folder, torch.float32, torch.device("cpu"))
        with quiet():
            return AutoModelForCausalLM.from_pretrained(self.spec.model.folder, dtype=torch.float32)


class PairRowTokenizer:
    """Tokenize rows of the plan as pairs, [b * g], row by row."""

    def __init__(self, spec: RerankSpec) -> None:
        self._format = spec.pair_format()
        self._uses_token_types = not spec.segments

    def __call__(self, rows: pa.Table) -> Inputs:
        passages = rows["passages"].to_pylist()
        queries = [[query] * len(each) for query, each in zip(rows["query"].to_pylist(), passages, strict=True)]
        pairs = self._format(list(chain.from_iterable(queries)), list(chain.from_iterable(passages)))
        if not self._uses_token_types:
            return Inputs(pairs.tokens)
        second = np.repeat(pairs.second, np.diff(pairs.tokens.offsets))
        return Inputs(pairs.tokens, (positions_of(pairs.tokens.offsets) >= second).astype(np.int64))


def _copy_head(head: Classifier, full: Any) -> None:
    """Copy the trained layers of the head into the full classifier."""
    prefix = f"{full.base_model_prefix}."
    state = {name: value for name, value in head.network.state_dict().items() if not name.startswith(prefix)}
    full.load_state_dict(state, strict=False)
    if head.stand_in.pooler is not None:
        pooler = getattr(full, full.base_model_prefix).pooler
        pooler.load_state_dict({name.removeprefix("1."): v for name, v in head.stand_in.pooler.state_dict().items()})
