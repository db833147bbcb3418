"""Files of a model: locate or download them, check that none is missing, and compute the model's revision."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..storage import directory
from ..storage.folder import Folder

MIB = 1 << 20  # bytes
# A directory has a tokenizer when it has one of these files.
VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "tekken.json"),
    *("tokenizer.model", "sentencepiece.bpe.model", "spiece.model"),
)
SMALL_FILES = ("*.json", "*.txt", "*.model")  # configuration and vocabulary
HUB_FILES = [*SMALL_FILES, "*.safetensors", "*.bin", "README.md"]
REQUIRED = object()  # the default of `read_json` for a file that must exist
BGE_M3_FILES = ("sparse_linear.pt", "colbert_linear.pt")  # BGE-M3's layers for lexical weights and multiple vectors


def locate(model: str, revision: str | None = None) -> Path:
    """Return the local directory of a path, a URL or a hub id, downloading it when needed. Raises ModelError."""
    if "://" in model:
        return _download_from_store(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise ModelError(f"{folder} is a file. Give the directory that contains config.json.")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f"There is no directory {folder}. Give an existing directory, or a hub id such as owner/name.")
    return _download(model, revision)


def cache_folder() -> Path:
    """Return this machine's cache of models from object stores: in SHOAL_MODELS, else in the system's temporary folder."""
    return Path(os.environ.get("SHOAL_MODELS", tempfile.gettempdir())) / "shoal-models"


def _download_from_store(url: str) -> Path:
    """Download a fine-tuned model from an object store into the cache of this machine, once."""
    try:
        return directory.download_directory(Folder(url), cache_folder())
    except FileNotFoundError as error:
        raise ModelError(
            f"{url} is not the folder of a whole model: it has no {directory.FILES}. Give the OUTPUT/model of a fine-tuning, or "
            "copy the model to a directory"
        ) from error


def _download(model: str, revision: str | None) -> Path:
    """Return the directory of the hub's snapshot, downloading what the hub cache lacks. Raises ModelError."""
    from huggingface_hub import snapshot_download

    wanted, other_runtimes = [*HUB_FILES, *BGE_M3_FILES], ["onnx/*", "openvino/*"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=other_runtimes))
    except Exception as error:  # the hub client raises a dozen types: no network, no such id, no access, wrong revision
        raise ModelError(
            f"{model!r} is neither a directory here ({Path(model).resolve()}) nor a model that could be fetched from "
            f"the hub: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. Check the name, or "
            "download it where there is a network and give its directory."
        ) from error


def check(folder: Path) -> list[Path]:
    """Return the weight files of a transformers directory. Raises ModelError without config, tokenizer or weights."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json, so it is not a transformers model. Give the directory that has it."
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} is a PEFT adapter. Merge it into its base model, save that, and give the result.")
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ModelError(
            f"{folder} has no tokenizer (one of {', '.join(VOCABULARIES)}). Copy the tokenizer's files there."
        )
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        weights = sorted(folder.glob(pattern))
        if weights:
            return weights
    raise ModelError(f"{folder} has no weights (model*.safetensors or pytorch_model*.bin). Fetch the model again.")


def read_json(file: Path, default: Any = REQUIRED) -> Any:
    """Parse a JSON file; return `default`, if given, where it is missing. Raises ModelError for a missing or broken one."""
    if default is not REQUIRED and not file.is_file():
        return default
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}. Fetch the model again.") from error


def revision(root: Path, folder: Path, weights: Sequence[Path], dense: Sequence[str]) -> str:
    """Return the hub commit of a hub snapshot; elsewhere "weights-" and 12 hex digits of a fingerprint of the files.

    The fingerprint reads small files whole, and of weight files the name, the size and the first and last MiB. It
    distinguishes two models in milliseconds; it does not detect damage.
    """
    if root.parent.name == "snapshots" and len(root.name) == 40:
        return root.name
    digest = hashlib.sha256()
    small = {file for place in {root, folder} for pattern in SMALL_FILES for file in place.glob(pattern)}
    small |= set(root.glob("*/config.json"))  # configurations of the modules after the transformer
    large = {*weights, *(file for name in dense for file in (root / name).glob("*.safetensors"))}
    large |= {file for name in dense for file in (root / name).glob("*.bin")}
    for file in sorted(small | large):
        digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode())
        digest.update(_ends(file) if file in large else file.read_bytes())
    return f"weights-{digest.hexdigest()[:12]}"


def _ends(file: Path) -> bytes:
    """Read the first and the last MiB of a file."""
    with file.open("rb") as stream:
        head = stream.read(MIB)
        stream.seek(max(0, file.stat().st_size - MIB))
        return head + stream.read(MIB)


def check_bge_m3(folder: Path) -> None:
    """Check that the checkpoint has the layers of BGE-M3's sparse and multi-vector outputs. Raises ModelError."""
    for name in BGE_M3_FILES:
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder} has no {name}: it is no BGE-M3 checkpoint. Leave sparse and multi_vector out of --outputs"
            )
