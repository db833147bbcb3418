"""Write a trained model as a directory that sentence-transformers, transformers and our own jobs load."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...models.files import HUB_FILES, read_json
from ...models.load import quiet
from ...models.modules_json import OLD_POOLING
from ...models.spec import ModelSpec
from ...recipes import PASSAGE, QUERY
from ...storage import directory
from ..step.trainable import merge_adapters

WEIGHT_FILE_SIZE = "2GB"  # upload to an object store reads one file into memory
TYPE = "sentence_transformers.models."
SETTINGS = "config_sentence_transformers.json"
# Files of the base model that are not copied: they are written anew, or describe the base model alone.
REPLACED = (directory.FILES, "README.md", "config.json", "modules.json", "sentence_bert_config.json", SETTINGS)


def save_embedder(network: Any, dense: nn.Sequential, spec: ModelSpec, prompts: tuple[str, str], folder: Path) -> None:
    """Write sentence-transformers' layout: weights, tokenizer, pooling, dense layers and normalisation."""
    folder.mkdir(parents=True, exist_ok=True)
    network = merge_adapters(network)
    if hasattr(network.config, "auto_map"):
        del network.config.auto_map  # names code of the base model's repository, which the trained network does not use
    with quiet():
        network.save_pretrained(folder, max_shard_size=WEIGHT_FILE_SIZE)
    copy_tokenizer(spec, folder)
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{TYPE}Transformer"}, _module(1, "Pooling")]
    write_json(folder / "1_Pooling/config.json", _pooling(spec))
    for number, (layer, source) in enumerate(zip(dense, spec.dense, strict=True), 2):
        kind = "LayerNorm" if "dimension" in read_json(Path(spec.path) / source / "config.json") else "Dense"
        modules.append(_module(number, kind))
        _save_layer(layer, Path(spec.path) / source, folder / modules[-1]["path"])
    if spec.normalize:
        modules.append(_module(len(modules), "Normalize"))
        (folder / modules[-1]["path"]).mkdir()
    write_json(folder / "modules.json", modules)
    transformer = {"max_seq_length": spec.max_tokens, "do_lower_case": spec.lower_case}
    write_json(folder / "sentence_bert_config.json", transformer)
    named = spec.prompts | {QUERY: prompts[0], PASSAGE: prompts[1], "document": prompts[1]}
    head: dict[str, Any] = {"prompts": named, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    if spec.truncate_dim:
        head["truncate_dim"] = spec.truncate_dim
    write_json(folder / SETTINGS, head)


def copy_tokenizer(spec: ModelSpec, folder: Path) -> None:
    """Copy the tokenizer's files. Where our tokenizer appended the end token (spec.append_eos), the copy does it itself."""
    for pattern in HUB_FILES:
        for file in Path(spec.folder).glob(pattern):
            weights = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
            if not weights and file.name not in REPLACED and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    settings = read_json(folder / "tokenizer_config.json", {})
    settings["model_max_length"] = spec.max_tokens
    settings.pop("auto_map", None)
    if spec.append_eos:
        settings["add_eos_token"] = True
    write_json(folder / "tokenizer_config.json", settings)
    if spec.append_eos and (folder / "tokenizer.json").is_file():
        _append_end(spec, folder)


def _append_end(spec: ModelSpec, folder: Path) -> None:
    """Add a post-processor that appends the end token, for tokenizers published without one, such as gte-Qwen2's."""
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    end = AutoTokenizer.from_pretrained(spec.folder, trust_remote_code=False).eos_token
    backend: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = backend.encode("a").ids
    if ids and ids[-1] == backend.token_to_id(end):
        return
    after = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B:1 {end}:1", special_tokens=[(end, backend.token_to_id(end))]
    )
    own = backend.post_processor
    backend.post_processor = after if own is None else processors.Sequence([own, after])
    backend.save(str(folder / "tokenizer.json"))


def _pooling(spec: ModelSpec) -> Mapping[str, Any]:
    modes = {name: mode in spec.pooling for name, mode in OLD_POOLING.items()}  # keys that every version reads
    return {"word_embedding_dimension": spec.hidden_size, "include_prompt": spec.include_prompt} | modes


def _module(number: int, kind: str) -> dict[str, Any]:
    return {"idx": number, "name": str(number), "path": f"{number}_{kind}", "type": f"{TYPE}{kind}"}


def _save_layer(layer: nn.Module, source: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    save_file({name: value.contiguous() for name, value in layer.state_dict().items()}, folder / "model.safetensors")


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
