"""VideoRetrieval of C-MTEB: 1,000 queries of a video site, 100,930 titles. As mteb 2.26 has it."""

from . import Task

TASK = Task(
    name="VideoRetrieval",
    dataset="mteb/VideoRetrieval",
    revision="146a9d5e4fd7a9c182b6b92cccb6a3753994305c",
    split="dev",
    ignore_identical_ids=True,
    languages=("cmn-Hans",),
)
