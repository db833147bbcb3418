"""Load the network of a model directory through transformers: its class, precision and weights."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from ..errors import ModelError, UsageError
from .spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Encoder-decoder families of which sentence-transformers runs the encoder alone.
ENCODER_CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the requested precision; "auto" is the fastest that the chip has in hardware. Raises UsageError.

    On a CPU without hardware support bfloat16 is a hundred times slower than float32, so "auto" reads the chip's features.
    """
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise UsageError(f"dtype={dtype!r} does not exist. Choose from auto, {', '.join(DTYPES)}.")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    chip = torch.cpu.get_capabilities()
    return torch.bfloat16 if chip.get("avx512_bf16") or chip.get("amx_bf16") else torch.float32


def load_network(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Load the network in evaluation mode on `device`, without cache and pooler. Raises ModelError if that fails."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(spec.folder, trust_remote_code=False)
    except Exception as error:  # ValueError, KeyError or whatever the model's own configuration class raises
        raise ModelError(
            f"transformers cannot read {spec.folder}/config.json: {type(error).__name__}: {error}"
        ) from error
    config.use_cache = False
    if spec.bidirectional or getattr(config, "is_causal", None) is False:
        config.is_causal = not spec.bidirectional
    network_type = _network_class(spec, config)
    has_pooler = "add_pooling_layer" in inspect.signature(network_type.__init__).parameters
    options = {"add_pooling_layer": False} if has_pooler else {}
    return from_pretrained(network_type, spec.folder, config=config, dtype=dtype, **options).to(device)


def from_pretrained(network_type: Any, folder: str, **options: Any) -> Any:
    """Load a network of transformers in evaluation mode. Raises ModelError for weights that are damaged or missing."""
    try:
        with quiet():
            network, report = network_type.from_pretrained(
                folder, trust_remote_code=False, output_loading_info=True, **options
            )
    except Exception as error:  # damaged or mismatched weights raise what the file's reader raises
        raise ModelError(
            f"{folder} cannot be loaded by {network_type.__name__}: {type(error).__name__}: {error}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of {type(network).__name__}, the first is {missing[0]!r}; they would be "
            "random. Fetch the model again, or give the directory of a model that transformers knows."
        )
    return network.eval()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder, from safetensors or torch files. Raises ModelError when there are none."""
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    if not weights:
        for file in sorted(folder.glob("pytorch_model*.bin")):
            weights |= torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    if not weights:
        raise ModelError(f"{folder} has neither *.safetensors nor pytorch_model*.bin. Fetch the model again.")
    return weights


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bar and its table of unused weights (a dropped pooler)."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _network_class(spec: ModelSpec, config: Any) -> Any:
    """Return transformers' class for the plain encoder of this configuration. Raises ModelError without one."""
    import transformers

    if spec.model_type in ENCODER_CLASSES:
        return getattr(transformers, ENCODER_CLASSES[spec.model_type])
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{spec.name} is an encoder-decoder ({spec.model_type}). Of those Shoal runs {', '.join(ENCODER_CLASSES)}."
        )
    if type(config) not in transformers.MODEL_MAPPING:
        raise ModelError(
            f"transformers {transformers.__version__} has no plain encoder for {spec.model_type!r} ({spec.name})."
        )
    network_class = transformers.MODEL_MAPPING[type(config)]
    return network_class[0] if isinstance(network_class, tuple | list) else network_class


def vocabulary_size(network: "PreTrainedModel") -> int:
    """Return the number of rows of the embedding table."""
    table: Any = network.get_input_embeddings()
    return int(table.weight.shape[0])


def position_start(network: nn.Module) -> int | None:
    """Return the padding id of a RoBERTa-like model, whose positions begin after it; None where they begin at 0."""
    for module in network.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding):
            return table.padding_idx
    return None
