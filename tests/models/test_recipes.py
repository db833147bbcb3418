"""Each published embedding system against the plain loop of its model card, on a tiny random checkpoint."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Model

from lib import recipes
from lib.errors import UsageError
from lib.models.encoder import Encoder
from lib.models.encoder_options import ModelOptions, resolve_encoder
from lib.models.tokenizer import Tokenizer
from tests.support import tiny

POSITIONS = 1024
INSTRUCTION = "为这个句子生成表示以用于检索相关文章："
QWEN_QUERY = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
QWEN_ECOM = "Instruct: Given a user query from an e-commerce website, retrieve description sentences of relevant products\nQuery: "


@dataclass(frozen=True)
class Card:
    """A model card: the architecture, the prompt of each kind of text, the length, and its way to vectors."""

    kind: str
    prompts: dict[str, str]
    length: int
    encode: Callable[[Path, Sequence[str], int], np.ndarray]


def first_token(folder: Path, texts: Sequence[str], length: int) -> np.ndarray:
    return _loop(folder, texts, length, lambda states, mask: states[:, 0])


def mean(folder: Path, texts: Sequence[str], length: int) -> np.ndarray:
    return _loop(folder, texts, length, lambda states, mask: (states * mask).sum(1) / mask.sum(1))


@torch.inference_mode()
def _loop(
    folder: Path, texts: Sequence[str], length: int, pool: Callable[[Tensor, Tensor], Tensor], size: int = 7
) -> np.ndarray:
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    outputs = []
    for start in range(0, len(texts), size):
        batch = tokenizer(
            list(texts[start : start + size]), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        states = network(**batch).last_hidden_state
        outputs.append(functional.normalize(pool(states, batch["attention_mask"].unsqueeze(-1).float()), dim=-1))
    return torch.cat(outputs).numpy()


@torch.inference_mode()
def last_token_of_qwen(folder: Path, texts: Sequence[str], length: int) -> np.ndarray:
    """Encode with transformers' Qwen2 without its mask, an end token after the truncated text, and no batches."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = Qwen2Model.from_pretrained(folder).eval()
    network.config.is_causal = False
    outputs = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=length - 1)["input_ids"] + [tokenizer.eos_token_id]
        outputs.append(network(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])
    return functional.normalize(torch.stack(outputs), dim=-1).numpy()


CARDS = {
    "piccolo-zh": Card("bert", {"query": "查询:", "passage": "结果:", "query-spaced": "查询: "}, 512, mean),
    "zhinao-search": Card("bert", {"query": INSTRUCTION, "passage": ""}, 512, first_token),
    "bge-zh": Card("bert", {"query": INSTRUCTION, "passage": ""}, 512, first_token),
    "chuxin-embedding": Card("xlm-roberta", {"query": "", "passage": "", "mining": INSTRUCTION}, 1024, first_token),
    "bge-m3": Card("xlm-roberta", {"query": "", "passage": ""}, 8192, first_token),
    "zhihui-llm-embedding": Card(
        "qwen2", {"query": QWEN_QUERY, "passage": "", "EcomRetrieval": QWEN_ECOM}, 512, last_token_of_qwen
    ),
}


def mixed_texts(count: int = 40) -> list[str]:
    """Return Chinese and English texts of 1 to about 3,000 tokens."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices(tiny.TEXT, k=rng.choice((1, 1, 2, 3, 8)))) for _ in range(count)]
    return [*texts, "鱼", "a", "查询:", " ".join(tiny.TEXT * 16)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function to a plain transformers checkpoint of an architecture, without any pooling configuration."""
    folders: dict[str, Path] = {}

    def checkpoint(kind: str) -> Path:
        if kind not in folders:
            positions = 8192 if kind == "xlm-roberta" else POSITIONS
            folders[kind] = tiny.build(kind, tmp_path_factory.mktemp(kind), positions=positions)
            for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
                (folders[kind] / name).unlink()
        return folders[kind]

    return checkpoint


@pytest.mark.parametrize(
    ("name", "prompt"), [(name, prompt) for name, card in CARDS.items() for prompt in card.prompts]
)
def test_a_recipe_equals_the_loop_of_its_card(
    name: str, prompt: str, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe over a plain checkpoint gives the vectors of its card within 1e-5."""
    card = CARDS[name]
    folder = checkpoints(card.kind)
    texts = mixed_texts()
    resolved = resolve_encoder(ModelOptions(model=str(folder), recipe=name, prompt_name=prompt))
    tokenizer = Tokenizer(resolved.spec)
    tokens = tokenizer([resolved.prompt + text for text in texts])

    vectors = Encoder(resolved.spec, dtype="float32").encode(tokens, tokenizer.prompt_tokens(resolved.prompt))

    expected = card.encode(folder, [card.prompts[prompt] + text for text in texts], card.length)
    assert tokens.truncated.any() == (card.length <= 1024)  # the longest text has some 3,000 tokens
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_every_embedding_recipe_has_a_card_here() -> None:
    """Every embedding recipe has a card here, or a test with the real weights (all-MiniLM-L6-v2)."""
    assert set(recipes.names(recipes.Recipe)) == {*CARDS, "all-minilm-l6-v2"}


@pytest.mark.parametrize("name", CARDS)
def test_a_corpus_takes_the_passage_prompt(name: str, checkpoints: Callable[[str], Path]) -> None:
    """The default prompt is the passages'; --prompt '' removes it."""
    folder = str(checkpoints(CARDS[name].kind))

    assert resolve_encoder(ModelOptions(model=folder, recipe=name)).prompt == CARDS[name].prompts["passage"]
    assert resolve_encoder(ModelOptions(model=folder, recipe=name, prompt="")).prompt == ""


def test_passages_of_360_have_a_title_and_queries_have_none(checkpoints: Callable[[str], Path]) -> None:
    """The template of two columns applies to passages only."""
    options = {"model": str(checkpoints("bert")), "recipe": "zhinao-search"}

    assert resolve_encoder(ModelOptions(**options)).text_template == "{title} {text}"
    assert resolve_encoder(ModelOptions(**options, prompt_name="query")).text_template is None


def test_an_unknown_prompt_is_refused(checkpoints: Callable[[str], Path]) -> None:
    """An unknown prompt is refused with the names of the prompts."""
    with pytest.raises(UsageError, match=r"no prompt 'document'.*query, passage, query-spaced"):
        resolve_encoder(ModelOptions(model=str(checkpoints("bert")), recipe="piccolo-zh", prompt_name="document"))


def test_model_code_of_a_checkpoint_is_not_run(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """The recipe of a checkpoint with model code of its own runs transformers' Qwen2 without its mask."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoints("qwen2").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}))
    resolved = resolve_encoder(ModelOptions(model=str(folder), recipe="zhihui-llm-embedding"))

    assert resolved.spec.bidirectional
    assert resolved.spec.append_eos
    assert Encoder(resolved.spec).mode == "packed"


def test_ids_of_the_prompts(tmp_path: Path) -> None:
    """Each prompt gives its golden ids in a vocabulary with one token a character."""
    characters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"查询结果:：为这个句子生成表示以用于检索相关文章。鱼"]
    tiny.build("bert", tmp_path, positions=POSITIONS)
    characters_tokenizer(characters).save_pretrained(tmp_path)

    def ids(recipe: str, prompt: str) -> list[int]:
        resolved = resolve_encoder(ModelOptions(model=str(tmp_path), recipe=recipe, prompt_name=prompt))
        return Tokenizer(resolved.spec)([resolved.prompt + "鱼"]).ids.tolist()

    fish = characters.index("鱼")
    assert ids("piccolo-zh", "query") == [2, 4, 5, 8, fish, 3]
    assert ids("piccolo-zh", "passage") == [2, 6, 7, 8, fish, 3]
    assert ids("piccolo-zh", "query-fullwidth") == [2, 4, 5, 9, fish, 3]
    assert ids("piccolo-zh", "query-spaced") == [2, 4, 5, 8, fish, 3]
    assert ids("zhinao-search", "passage") == [2, fish, 3]
    instruction = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 9]
    assert ids("zhinao-search", "query") == ids("bge-zh", "query") == [2, *instruction, fish, 3]


def characters_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build BERT's pipeline over single characters."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, processors

    backend = Backend(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", vocabulary.index("[CLS]")), ("[SEP]", vocabulary.index("[SEP]"))]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
