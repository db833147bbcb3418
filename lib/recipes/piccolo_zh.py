"""piccolo-base-zh and piccolo-large-zh (SenseTime, MIT): BERT, mean of the token states, prompts for query and passage.

Source: the model card. Its punctuation reached us normalised, so the colon of the prompts is not certain: `query` and
`passage` have the card's, `-spaced` the one of its training note, `-fullwidth` that of a third party's code. Compare
them on a small task before a large run. Texts of one kind (short to short) take no prompt: `--prompt ''`.
Not seen: the checkpoint's own pooling file, and the temperature, rate and epochs of its training.
Verified here on a tiny random checkpoint of the architecture only.
"""

from . import PASSAGE, QUERY, Recipe, TrainingStage, c_mteb

RECIPE = Recipe(
    models=("sensenova/piccolo-large-zh", "sensenova/piccolo-base-zh"),
    pooling="mean",
    normalize=True,
    max_tokens=512,
    prompts={
        QUERY: "查询:",
        PASSAGE: "结果:",
        "query-spaced": "查询: ",
        "passage-spaced": "结果: ",
        "query-fullwidth": "查询：",
        "passage-fullwidth": "结果：",
    },
    training=(
        TrainingStage(
            name="piccolo-stage1",
            loss=("infonce:temperature=0.01",),  # ours: piccolo2's; the first version's is not published
            batch=32 * 1024,
            query_tokens=128,
            passage_tokens=128,
            query_prompt="",  # the card tells of prompts for the second stage only
            passage_prompt="",
            learning_rate=2e-4,  # ours: usual for weak pairs at this batch
            warmup=0.05,  # ours
            gradient_checkpointing=True,
            precision="float16",
            chosen=("loss", "learning_rate", "warmup", "epochs"),
            note="400 million weak pairs, in-batch negatives only, 32 A100 with 1,024 rows each; whether negatives cross the "
            "devices is not stated, here they do: 32,768 passages a query",
        ),
        TrainingStage(
            name="piccolo-stage2",
            loss=("gte:temperature=0.01",),  # the improved contrastive loss of GTE; its temperature is GTE's
            batch=128,  # ours: GTE's in this stage
            group=8,  # 2 to 7 hard negatives
            epochs=3,  # ours: piccolo2's
            query_tokens=64,
            passage_tokens=512,
            learning_rate=1e-5,  # ours: piccolo2's
            gradient_checkpointing=True,
            precision="float16",
            chosen=("batch", "epochs", "learning_rate"),
            note="20 million labelled pairs as triplets, the prompts on every text, more short-to-passage data; ZeRO-1",
        ),
        TrainingStage(
            name="piccolo2",
            loss=("infonce:temperature=0.01",),
            dataset_loss=(
                "sts=cosent:temperature=0.05,weight=0.04",
                "classification=classification:temperature=0.05,weight=0.2",
            ),
            matryoshka=(256, 512, 768, 1024, 1280, 1536, 1792),
            batch=128,  # ours: the published example has 8, on one device
            group=2,
            epochs=3,
            query_tokens=64,
            passage_tokens=512,
            query_prompt="",
            passage_prompt="",
            learning_rate=1e-5,
            gradient_checkpointing=True,
            precision="float16",
            chosen=("batch",),
            note="arXiv 2405.06932; a model with a layer of 1,792 dimensions after the pooling; the datasets of the two other "
            "losses are to be named `sts` and `classification`; the published positions are frozen, here they are not",
        ),
    ),
    scores={
        "sensenova/piccolo-base-zh": c_mteb(
            retrieval=(82.384, 77.924, 88.255, 84.503, 42.025, 62.876, 58.09, 73.54),
            reranking=(66.46, 28.87, 85.25, 86.15),
        ),
        "sensenova/piccolo-large-zh": c_mteb(
            retrieval=(82.47, 77.83, 87.97, 85.04, 41.98, 61.91, 59.04, 71.18), reranking=(66.96, 27.28, 84.79, 84.89)
        ),
    },
)
