"""Score heads: the classifier of a network, or the logits of single tokens, on the states of pairs. Float32 scores.

Of a language model's output matrix only the rows of the answers' tokens are read, so no logits of the vocabulary are
computed.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .load import from_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that change the logits after the output matrix; a model with one of them is refused.
LOGIT_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale")
OUTPUT_NAMES = ("lm_head.weight", "output.weight", "embed_out.weight")


class TokenLogits(nn.Module):
    """score = h.W[yes], or h.(W[yes] - W[no]): the logit of an answer, or its difference to the other answer's."""

    def __init__(self, network: "PreTrainedModel", folder: str, yes: int, no: int | None) -> None:
        """Read the rows of the answers. Raises ModelError without an output matrix, or with a scale after it."""
        super().__init__()
        for name in LOGIT_SCALES:
            if getattr(network.config, name, None) not in (None, 1.0):
                raise ModelError(f"{folder}/config.json sets {name}, which changes the logits and is not followed.")
        rows = output_rows(network, folder, [yes] if no is None else [yes, no])
        self.row = nn.Parameter(rows[0] - rows[1] if no is not None else rows[0], requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        """Score states [n, hidden] of the last tokens: float32 [n]."""
        return states.float() @ self.row


def output_rows(network: "PreTrainedModel", folder: str, tokens: Sequence[int]) -> Tensor:
    """Read rows of the output matrix, float32 [len(tokens), hidden], from the weight files, or of the tied embeddings."""
    for file in sorted(Path(folder).glob("model*.safetensors")):
        from safetensors import safe_open

        with safe_open(file, "pt") as weights:
            for name in OUTPUT_NAMES:
                if name in weights.keys():  # noqa: SIM118 (not a mapping)
                    matrix = weights.get_slice(name)
                    return torch.cat([matrix[token : token + 1] for token in tokens]).float()
    for file in sorted(Path(folder).glob("pytorch_model*.bin")):
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        for name in OUTPUT_NAMES:
            if name in content:
                return content[name][list(tokens)].float()
    if not getattr(network.config, "tie_word_embeddings", False):
        raise ModelError(f"{folder} has no output matrix ({', '.join(OUTPUT_NAMES)}), and its embeddings are not tied.")
    table: Any = network.get_input_embeddings()
    return table.weight[list(tokens)].float().cpu()


class Classifier(nn.Module):
    """A sequence classifier's own layers after its backbone, on pooled states.

    The classifier runs with a stand-in for its backbone. The stand-in returns every pair as a sequence of one token.
    """

    def __init__(self, network: "PreTrainedModel") -> None:
        """Take the classifier of `network`, whose backbone the stand-in replaces. Raises ModelError."""
        super().__init__()
        if network.config.num_labels != 1:
            raise ModelError(
                f"{network.name_or_path} gives {network.config.num_labels} labels a pair; a reranker gives one."
            )
        place = network.base_model_prefix
        backbone = getattr(network, place)
        self.stand_in = _StandIn(deepcopy(_pooler(backbone)))
        setattr(network, place, self.stand_in)
        network.config.pad_token_id = -1  # no id, so the one token of a sequence is never padding
        self.network = network.float()  # 16 bits would give many passages of a query the same score

    def forward(self, states: Tensor) -> Tensor:
        """Score pooled states [n, hidden]: float32 logits [n]."""
        self.stand_in.states = states.float().unsqueeze(1)
        ids = torch.zeros(len(states), 1, dtype=torch.int64, device=states.device)
        return self.network(input_ids=ids).logits.float().squeeze(1)


def _pooler(backbone: nn.Module) -> nn.Module | None:
    """The layers from states [n, tokens, hidden] to the pooled [n, hidden]; ALBERT has a bare layer and its activation."""
    pooler = getattr(backbone, "pooler", None)
    if isinstance(pooler, nn.Linear):
        return nn.Sequential(_First(), pooler, getattr(backbone, "pooler_activation", None) or nn.Identity())
    return pooler


class _First(nn.Module):
    """The state of the first token."""

    def forward(self, states: Tensor) -> Tensor:
        return states[:, 0]


class _StandIn(nn.Module):
    """A replacement of the backbone that returns the states in `states`."""

    states: Tensor

    def __init__(self, pooler: nn.Module | None) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, *_: object, **__: object) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        pooled = None if self.pooler is None else self.pooler(self.states)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=self.states, pooler_output=pooled)


def load_classifier(folder: str, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Load the whole network with its classifier, in evaluation mode. Raises ModelError if that fails."""
    from transformers import AutoModelForSequenceClassification

    network = from_pretrained(AutoModelForSequenceClassification, folder, dtype=dtype)
    network.config.use_cache = False
    return network.to(device)
