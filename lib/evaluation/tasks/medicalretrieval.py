"""MedicalRetrieval of C-MTEB: 1,000 medical questions, 100,999 replies. As mteb 2.26 has it."""

from . import Task

TASK = Task(
    name="MedicalRetrieval",
    dataset="mteb/MedicalRetrieval",
    revision="023ae3b2c6b96f583c4ff9b3f9239c93f7885c20",
    split="dev",
    ignore_identical_ids=True,
    languages=("cmn-Hans",),
)
