"""Zhihui_LLM_Embedding (Lenovo, cc-by-nc-4.0) and its base gte-Qwen2-7B-instruct: Qwen2 without its causal mask.

Sources: both model cards, and how text-embeddings-inference and vLLM run gte-Qwen2. The repositories bring model code
of their own, which transformers 5 cannot load; transformers' Qwen2 with `is_causal=False` is the same network. The
shipped tokenizer appends no end token, so Shoal does, after cutting; the last token is pooled. Every retrieval task has
its own instruction: `--prompt-name T2Retrieval`. Passages have none.
Verified here on a tiny random Qwen2 only. No hyperparameter of the training is public.
"""

from . import PASSAGE, QUERY, Recipe, Stage

WEB = "Given a web search query, retrieve relevant passages that answer the query"
CHINESE = "Given a Chinese search query, retrieve web passages that answer the question"
MEDICAL = "Given a Chinese community medical question, retrieve replies that best answer the question"
TASKS = {  # mteb's instruction of each task
    "T2Retrieval": CHINESE,
    "DuRetrieval": CHINESE,
    "T2Reranking": CHINESE,
    "MMarcoReranking": CHINESE,
    "MMarcoRetrieval": WEB,
    "CovidRetrieval": "Given a question on COVID-19, retrieve news articles that answer the question",
    "CmedqaRetrieval": MEDICAL,
    "CMedQAv1-reranking": MEDICAL,
    "CMedQAv2-reranking": MEDICAL,
    "EcomRetrieval": "Given a user query from an e-commerce website, retrieve description sentences of relevant products",
    "MedicalRetrieval": "Given a medical question, retrieve user replies that best answer the question",
    "VideoRetrieval": "Given a video search query, retrieve the titles of relevant videos",
}

RECIPE = Recipe(
    models=("Lenovo-Zhihui/Zhihui_LLM_Embedding", "Alibaba-NLP/gte-Qwen2-7B-instruct"),
    pooling="lasttoken",
    normalize=True,
    max_tokens=512,
    bidirectional=True,
    append_eos=True,
    prompts={PASSAGE: ""} | {name: f"Instruct: {task}\nQuery: " for name, task in ({QUERY: WEB} | TASKS).items()},
    dtype="bfloat16",
    training=(
        Stage(
            name="finetune",
            loss="hardness_infonce",
            gathered=True,
            precision="bfloat16",
            note="GradCache, homogeneous batches, cross-batch negatives; harder negatives weigh more, by a formula that is "
            "not published; data by GPT-3.5 and GPT-4, positives scored and queries rewritten by a language model",
        ),
    ),
    scores={
        "Lenovo-Zhihui/Zhihui_LLM_Embedding": {
            "T2": 88.296,
            "MMarco": 84.772,
            "Du": 91.338,
            "Covid": 84.387,
            "Cmedqa": 48.693,
            "Ecom": 71.959,
            "Medical": 65.192,
            "Video": 79.313,
        },
        "Alibaba-NLP/gte-Qwen2-7B-instruct": {
            "T2": 87.73,
            "MMarco": 85.16,
            "Du": 87.44,
            "Covid": 83.65,
            "Cmedqa": 48.69,
            "Ecom": 71.15,
            "Medical": 65.59,
            "Video": 78.84,
        },
    },
)
