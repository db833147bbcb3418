"""Train an embedding model: load it, tokenize rows for it, and save it as a model directory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch

from ...models.packing import offsets_of
from ...models.spec import ModelSpec, Tokens, on_this_machine
from ...models.tokenizer import Tokenizer
from ..step.grad_cache import GradCacheStep
from ..step.trainable import Adapters, Inputs, LoadedModel, add_adapters
from .export import save_embedder
from .networks import VectorNetwork, load_backbone


@dataclass(frozen=True)
class EmbedderTrainable:
    """An embedding model to train.

    spec: the model and its pooling. prompts: for queries without a prompt of their own, and for passages. max_tokens: of a
    query and of a passage.
    """

    spec: ModelSpec
    prompts: tuple[str, str]
    max_tokens: tuple[int, int]
    adapters: Adapters | None = None
    network_class: ClassVar[type[VectorNetwork]] = VectorNetwork

    def on_this_machine(self) -> "EmbedderTrainable":
        return replace(self, spec=on_this_machine(self.spec))

    def row_tokenizer(self) -> "EmbedderRowTokenizer":
        return EmbedderRowTokenizer(self)

    def load(self, device: torch.device) -> LoadedModel:
        """Raises ModelError."""
        backbone, padding_id = load_backbone(self.spec, device)
        backbone.network = add_adapters(backbone.network, self.adapters)
        return LoadedModel(self.network_class(self.spec, backbone).to(device), backbone, padding_id)

    def step_factory(self) -> Callable[..., GradCacheStep]:
        return GradCacheStep

    def save(self, network: VectorNetwork, folder: Path) -> None:
        """Write a model directory that sentence-transformers and our own jobs load."""
        save_embedder(network.backbone.network, network.dense, self.spec, self.prompts, folder)


class EmbedderRowTokenizer:
    """Tokenize rows of the plan: queries [b], then passages [b * g]."""

    def __init__(self, embedder: EmbedderTrainable) -> None:
        query_tokens, passage_tokens = embedder.max_tokens
        self.prompts = embedder.prompts
        self.passage_tokenizer = Tokenizer(replace(embedder.spec, max_tokens=passage_tokens))
        self.query_tokenizer = self.passage_tokenizer
        if query_tokens != passage_tokens:
            self.query_tokenizer = Tokenizer(replace(embedder.spec, max_tokens=query_tokens))

    def __call__(self, rows: pa.Table) -> Inputs:
        prompts = [self.prompts[0] if prompt is None else prompt for prompt in rows["prompt"].to_pylist()]
        queries = [prompt + text for prompt, text in zip(prompts, rows["query"].to_pylist(), strict=True)]
        passages = [self.prompts[1] + text for texts in rows["passages"].to_pylist() for text in texts]
        ids, offsets, truncated = zip(self.query_tokenizer(queries), self.passage_tokenizer(passages), strict=True)
        lengths = np.concatenate([np.diff(each) for each in offsets])
        return Inputs(Tokens(np.concatenate(ids), offsets_of(lengths), np.concatenate(truncated)))
