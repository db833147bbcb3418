"""Zhihui_LLM_Embedding (Lenovo, cc-by-nc-4.0) and its base gte-Qwen2-7B-instruct: Qwen2 without its causal mask.

Sources: both model cards, and how text-embeddings-inference and vLLM run gte-Qwen2. The repositories bring model code
of their own, which transformers 5 cannot load; transformers' Qwen2 with `is_causal=False` is the same network. The
shipped tokenizer appends no end token, so Shoal does, after cutting; the last token is pooled. Every retrieval task has
its own instruction: `--prompt-name T2Retrieval`. Passages have none.
Verified here on a tiny random Qwen2 only. No hyperparameter of the training is public.
"""

from . import PASSAGE, QUERY, Recipe, TrainingStage, c_mteb

# The task of each benchmark in words, from mteb's model file; the model was trained with such instructions.
INSTRUCTIONS = {
    QUERY: "Given a web search query, retrieve relevant passages that answer the query",
    "CmedqaRetrieval": "Given a Chinese community medical question, retrieve replies that best answer the question",
    "CMedQAv1-reranking": "Given a Chinese community medical question, retrieve replies that best answer the question",
    "CMedQAv2-reranking": "Given a Chinese community medical question, retrieve replies that best answer the question",
    "CovidRetrieval": "Given a question on COVID-19, retrieve news articles that answer the question",
    "DuRetrieval": "Given a Chinese search query, retrieve web passages that answer the question",
    "EcomRetrieval": "Given a user query from an e-commerce website, retrieve description sentences of relevant products",
    "MedicalRetrieval": "Given a medical question, retrieve user replies that best answer the question",
    "MMarcoReranking": "Given a Chinese search query, retrieve web passages that answer the question",
    "MMarcoRetrieval": "Given a web search query, retrieve relevant passages that answer the query",
    "T2Reranking": "Given a Chinese search query, retrieve web passages that answer the question",
    "T2Retrieval": "Given a Chinese search query, retrieve web passages that answer the question",
    "VideoRetrieval": "Given a video search query, retrieve the titles of relevant videos",
}

RECIPE = Recipe(
    models=("Lenovo-Zhihui/Zhihui_LLM_Embedding", "Alibaba-NLP/gte-Qwen2-7B-instruct"),
    pooling="lasttoken",
    normalize=True,
    max_tokens=512,
    bidirectional=True,
    append_eos=True,
    prompts={PASSAGE: ""} | {name: f"Instruct: {task}\nQuery: " for name, task in INSTRUCTIONS.items()},
    training=(
        TrainingStage(
            name="zhihui",
            start="Alibaba-NLP/gte-Qwen2-7B-instruct",
            loss=("hardness-infonce:temperature=0.02,alpha=9",),  # ours: a reading of "harder negatives weigh more"
            batch=512,
            group=8,
            learning_rate=1e-4,  # with adapters
            warmup=0.05,
            lora_rank=16,
            lora_alpha=32,
            gradient_checkpointing=True,
            precision="bfloat16",
            chosen=("loss", "batch", "group", "epochs", "learning_rate", "warmup", "lora_rank", "lora_alpha"),
            note="GradCache, homogeneous batches and cross-batch negatives are published, no number is; `self-normalised` and "
            "`focal-infonce` are the other readings of the loss. Data by GPT-3.5 and GPT-4, positives scored and queries "
            "rewritten by a language model",
        ),
    ),
    scores={
        "Lenovo-Zhihui/Zhihui_LLM_Embedding": c_mteb(
            retrieval=(88.296, 84.772, 91.338, 84.387, 48.693, 71.959, 65.192, 79.313)
        ),
        "Alibaba-NLP/gte-Qwen2-7B-instruct": c_mteb(
            retrieval=(87.73, 85.16, 87.44, 83.65, 48.69, 71.15, 65.59, 78.84), reranking=(67.80, 31.65, 88.20, 88.03)
        ),
    },
)
