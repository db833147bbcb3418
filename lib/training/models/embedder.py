"""What is trained when the loss is of vectors: an embedding model, its texts, and its directory in the end."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ...models.packing import offsets_of
from ...models.spec import ModelSpec, Tokens, on_this_machine
from ...models.tokenizer import Tokenizer
from ..step.grad_cache import GradCacheStep
from ..step.trainable import Adapters, Inputs, LoadedModel, Texts, adapted
from .export import save_embedder
from .networks import VectorNetwork, load_backbone


@dataclass(frozen=True)
class Embedder:
    """spec: the model and how it pools. prompts: before queries that bring none, and before passages. tokens: of a query and
    of a passage at most."""

    spec: ModelSpec
    prompts: tuple[str, str]
    tokens: tuple[int, int]
    adapters: Adapters | None = None

    def here(self) -> "Embedder":
        return replace(self, spec=on_this_machine(self.spec))

    def texts(self) -> "EmbedderTexts":
        return EmbedderTexts(self)

    def load(self, device: torch.device) -> LoadedModel:
        """Raises ModelError."""
        backbone, padding_id = load_backbone(self.spec, device)
        backbone.network = adapted(backbone.network, self.adapters)
        network = VectorNetwork(self.spec, backbone).to(device)
        return LoadedModel(network, backbone, padding_id)

    def step(self) -> Callable[..., GradCacheStep]:
        return GradCacheStep

    def save(self, network: VectorNetwork, folder: Path) -> None:
        """Write the directory that sentence-transformers and our own jobs load."""
        save_embedder(network.backbone.network, network.dense, self.spec, self.prompts, folder)


class EmbedderTexts(Texts):
    """Rows of the plan as tokens: queries [b], then passages [b * g]."""

    def __init__(self, embedder: Embedder) -> None:
        most_query, most_passage = embedder.tokens
        self.prompts = embedder.prompts
        self.of_passages = Tokenizer(replace(embedder.spec, max_tokens=most_passage))
        same = most_query == most_passage
        self.of_queries = self.of_passages if same else Tokenizer(replace(embedder.spec, max_tokens=most_query))

    def __call__(self, rows: pa.Table) -> Inputs:
        prompts = [self.prompts[0] if given is None else given for given in rows["prompt"].to_pylist()]
        queries = [prompt + text for prompt, text in zip(prompts, rows["query"].to_pylist(), strict=True)]
        passages = [self.prompts[1] + text for texts in rows["passages"].to_pylist() for text in texts]
        return Inputs(joined(self.of_queries(queries), self.of_passages(passages)))


def joined(first: Tokens, second: Tokens) -> Tokens:
    """The texts of both, one after the other."""
    lengths = np.concatenate([np.diff(first.offsets), np.diff(second.offsets)])
    ids = np.concatenate([first.ids, second.ids])
    return Tokens(ids, offsets_of(lengths), np.concatenate([first.truncated, second.truncated]))
