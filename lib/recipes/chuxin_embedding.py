"""Chuxin-Embedding (MIT): XLM-RoBERTa-large from bge-m3's pretraining, first token, no prompt, 1024 tokens.

Source: the model card and its scripts. The model takes 8192 tokens (`--max-tokens 8192`), the card encodes 1024. Its
mining script puts 360Zhinao's instruction before queries (`--prompt-name mining`); which prompt and length gave the
published scores is not stated. Verified here on a tiny random checkpoint of the architecture only.
"""

from dataclasses import replace

from . import PASSAGE, QUERY, Recipe, TrainingStage, bge_m3, c_mteb

RECIPE = Recipe(
    models=("chuxin-llm/Chuxin-Embedding",),
    pooling="cls",
    normalize=True,
    max_tokens=1024,
    prompts={QUERY: "", PASSAGE: "", "mining": "为这个句子生成表示以用于检索相关文章："},
    training=(
        TrainingStage(
            name="chuxin-pretrain",
            loss=("retromae",),
            start="BAAI/bge-m3-retromae",
            batch=256,  # ours
            epochs=2,
            passage_tokens=512,
            learning_rate=2e-5,
            warmup=0.1,  # ours
            precision="float16",
            chosen=("batch", "warmup"),
            note="about 100 million texts; encoder mask 0.30, decoder mask 0.50; rate, epochs and length are RetroMAE's own",
        ),
        TrainingStage(
            name="chuxin-finetune",
            loss=("infonce:temperature=0.02",),
            batch=1024,  # ours
            group=8,
            query_tokens=512,
            passage_tokens=512,
            learning_rate=1e-5,
            warmup=0.1,
            gradient_checkpointing=True,
            precision="float16",
            chosen=("batch",),
            note="about 100 million public pairs, as BGE is finetuned: all other numbers are BGE's. Begins from what "
            "chuxin-pretrain gives: --model",
        ),
        replace(
            bge_m3.RECIPE.training[0],
            name="chuxin-unified",
            start=None,
            note="about a million public and a million synthetic pairs, mined at ranks 20 to 200 with 15 negatives, then cleaned "
            "by a reranker: cleaning is the gain. Numbers are those of FlagEmbedding's example of unified finetuning",
        ),
    ),
    scores={
        "chuxin-llm/Chuxin-Embedding": c_mteb(retrieval=(84.04, 79.06, 85.65, 84.28, 56.58, 74.01, 75.62, 83.84)),
    },
)
