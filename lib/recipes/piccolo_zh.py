"""piccolo-base-zh and piccolo-large-zh (SenseTime, MIT): BERT, mean of the token states, prompts for query and passage.

Source: the model card. Its punctuation reached us normalised, so the colon of the prompts is not certain: `query` and
`passage` have the card's, `-spaced` the one of its training note, `-fullwidth` that of a third party's code. Compare
them on a small task before a large run. Texts of one kind (short to short) take no prompt: `--prompt ''`.
Not seen: the checkpoint's own pooling file, and the temperature, rate and epochs of its training.
Verified here on a tiny random checkpoint of the architecture only.
"""

from . import PASSAGE, QUERY, Recipe, Stage

TASKS = (
    *(f"{name}Retrieval" for name in ("T2", "MMarco", "Du", "Covid", "Cmedqa", "Ecom", "Medical", "Video")),
    *("T2Reranking", "MMarcoReranking", "CMedQAv1-reranking", "CMedQAv2-reranking"),
)
BASE = (82.384, 77.924, 88.255, 84.503, 42.025, 62.876, 58.09, 73.54, 66.46, 28.87, 85.25, 86.15)
LARGE = (82.47, 77.83, 87.97, 85.04, 41.98, 61.91, 59.04, 71.18, 66.96, 27.28, 84.79, 84.89)

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
    dtype="float16",
    training=(
        Stage(
            name="weak pairs",
            loss="infonce",
            batch=32 * 1024,
            group=1,
            query_tokens=128,
            passage_tokens=128,
            precision="float16",
            note="400 million pairs, in-batch negatives only; whether they cross devices is not stated",
        ),
        Stage(
            name="labelled triplets",
            loss="gte",
            query_tokens=64,
            passage_tokens=512,
            precision="float16",
            note="20 million pairs with 2 to 7 hard negatives; a prompt on every text; ZeRO-1, gradient checkpointing",
        ),
    ),
    scores={
        "sensenova/piccolo-base-zh": dict(zip(TASKS, BASE, strict=True)),
        "sensenova/piccolo-large-zh": dict(zip(TASKS, LARGE, strict=True)),
    },
)
