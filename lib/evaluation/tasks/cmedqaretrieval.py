"""CmedqaRetrieval of C-MTEB: 3,999 medical questions of an online community, 100,001 replies. As mteb 2.26 has it."""

from . import Task

TASK = Task(
    name="CmedqaRetrieval",
    dataset="mteb/CmedqaRetrieval",
    revision="c476f85bf03d6642ec66bf54b9a551c88108bbb4",
    split="dev",
    languages=("cmn-Hans",),
)
