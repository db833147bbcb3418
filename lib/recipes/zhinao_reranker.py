"""360Zhinao-1.8B-Reranking (Qihoo 360, their own licence): a LLaMA-like decoder with one scalar a pair.

Source: Reranking/flag_models.py of the 360zhinao repository, which tokenises segment by segment, with an empty system message,
and leaves 64 of 1024 tokens to the template. The released checkpoint runs through its own code; `jobs/convert_reranker.py`
writes it as transformers' LLaMA classifier, which is the same network, and compares 100 scores with the original's. The
token at which the scalar is read is in that code alone: the conversion detects it. Verified here on a tiny checkpoint of the
same shape with code written for the test; the real weights were out of reach.
"""

from . import RerankRecipe, TrainingStage, c_mteb

BEFORE = ("<|im_start|>", "system", "\n", "<|im_end|>", "\n", "<|im_start|>user", "\n")
AFTER = ("<|im_end|>", "\n", "<|im_start|>assistant", "\n", "0", "<|im_end|>", "\n")  # "0" stands for a label

RECIPE = RerankRecipe(
    models=("qihoo360/360Zhinao-1.8B-Reranking",),
    segments=(*BEFORE, "{query}\n\n{passage}", *AFTER),
    beyond=(*BEFORE, *AFTER),
    activation="none",
    max_tokens=960,  # of query and passage; 64 more are left to the rest
    training=(
        TrainingStage(
            name="360zhinao-reranker",
            loss=("listwise",),  # ours: the loss is in code that is not published
            batch=16,
            group=8,  # ours; the file names of the release speak of 10 hard and 10 random negatives
            epochs=5,
            passage_tokens=512,
            learning_rate=1e-5,
            schedule="constant",  # the DeepSpeed file's scheduler replaces the cosine of the script
            warmup=0.01,
            weight_decay=0.1,
            beta2=0.95,
            gradient_checkpointing=True,
            precision="bfloat16",
            chosen=("loss", "group"),
            note="graded labels as text, one device of one row and 16 accumulated; ZeRO-3; adapters of rank 64, alpha 16 and "
            "dropout 0.05 are offered",
        ),
    ),
    scores={
        "qihoo360/360Zhinao-1.8B-Reranking": c_mteb(reranking=(68.55, 37.29, 86.75, 87.92)),
    },
)
