"""360Zhinao-search (Qihoo 360; code Apache-2.0, weights under the 360 model licence): BERT-large, first token.

Sources: the model card, `Retrieval/eval` and `Retrieval/finetune` of its repository. The card's example has no prompt,
its leaderboard run has the query instruction below; passages are title and text. A corpus without titles takes
`--text-template '{text}'`. Verified here on a tiny random checkpoint of the architecture only.
"""

from . import PASSAGE, QUERY, Recipe, TrainingStage, c_mteb

RECIPE = Recipe(
    models=("qihoo360/360Zhinao-search",),
    pooling="cls",
    normalize=True,
    max_tokens=512,
    prompts={QUERY: "为这个句子生成表示以用于检索相关文章：", PASSAGE: ""},
    passage_template="{title} {text}",
    training=(
        TrainingStage(
            name="360zhinao-search",
            loss=("focal-infonce:temperature=0.02,gamma=2",),
            batch=64,
            group=9,
            epochs=5,
            query_tokens=256,
            passage_tokens=512,
            learning_rate=1e-5,
            weight_decay=0.0,  # of transformers' trainer, which it ran in; so is the schedule
            precision="float16",
            note="8 devices of 8 rows, 8 hard negatives a query, negatives cross devices; ZeRO-2; C-MTEB test texts removed "
            "from the data",
        ),
    ),
    scores={
        "qihoo360/360Zhinao-search": c_mteb(
            retrieval=(87.12, 83.32, 87.57, 85.02, 46.73, 68.90, 63.69, 78.09), reranking=(67.80, 32.41, 87.01, 88.48)
        ),
    },
)
