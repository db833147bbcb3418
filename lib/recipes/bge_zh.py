"""bge-{large,base,small}-zh-v1.5 (BAAI, MIT): BERT, first token, an instruction before queries only.

Source: the model card and FlagEmbedding's examples. Verified here on a tiny random checkpoint of the architecture only.
"""

from . import PASSAGE, QUERY, Recipe, TrainingStage, c_mteb

RECIPE = Recipe(
    models=("BAAI/bge-large-zh-v1.5", "BAAI/bge-base-zh-v1.5", "BAAI/bge-small-zh-v1.5"),
    pooling="cls",
    normalize=True,
    max_tokens=512,
    prompts={QUERY: "为这个句子生成表示以用于检索相关文章：", PASSAGE: ""},
    training=(
        TrainingStage(
            name="bge-zh",
            loss=("infonce:temperature=0.02",),
            batch=1024,  # ours
            group=2,
            epochs=5,
            query_tokens=64,
            passage_tokens=256,
            learning_rate=1e-5,
            precision="float16",
            chosen=("batch",),
            note="lengths of FlagEmbedding's example; two models, with and without instruction, are merged",
        ),
    ),
    scores={
        "BAAI/bge-large-zh-v1.5": c_mteb(
            retrieval=(83.99, 79.23, 86.32, 73.35, 42.57, 65.33, 59.59, 73.32), reranking=(65.74, 28.74, 83.45, 85.44)
        ),
    },
)
