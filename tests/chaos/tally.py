"""What a chaos run counts; shared by its threads."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

LEAD = 2  # kills that the server may be ahead of driver and workers
STEPS = ("Read", "Compute", "Publish", "ShardWorker")  # the classes that Ray names worker processes by
SERVERS = ("gateway", "whole server")


@dataclass
class Tally:
    """Counts so far. `target`: kills wanted of each kind; `kinds`: what can be killed here; `rows`: of the corpus."""

    target: int
    kinds: tuple[str, ...]
    rows: int
    kills: Counter[str] = field(default_factory=Counter)  # "driver", STEPS, SERVERS
    starts: int = 0  # of the driver
    barren: int = 0  # starts killed before they had published
    slow: int = 0  # of these, starts given up on after a long time without a part
    exits: Counter[int] = field(default_factory=Counter)  # of drivers that nobody killed
    last_lines: dict[int, Counter[str]] = field(default_factory=dict)
    tracebacks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    orphan_seconds: float = 0.0  # the longest that a worker outlived its driver
    parts: int = 0  # seen whole
    done: int = 0  # rows in them
    over: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)

    def killed(self) -> dict[str, int]:
        """Kills by kind: driver, worker, server."""
        sums = {
            "driver": self.kills["driver"],
            "worker": sum(self.kills[name] for name in STEPS),
            "server": sum(self.kills[name] for name in SERVERS),
        }
        return {kind: sums[kind] for kind in self.kinds}

    def wanted(self, kind: str) -> bool:
        """Whether more kills of this kind are to come."""
        return self.killed()[kind] < self.target

    def enough(self) -> bool:
        return not any(self.wanted(kind) for kind in self.kinds)

    def late(self, kind: str) -> bool:
        """Whether the rows done are ahead of the kills of this kind, so that the next must not wait."""
        return self.wanted(kind) and self.done > self.rows * (0.02 + 0.8 * self.killed()[kind] / self.target)

    def early(self, kind: str) -> bool:
        """Whether the kills of this kind are ahead of another's, so that the next must wait: all last to the end."""
        return self.killed()[kind] > min(self.killed().values()) + LEAD

    def fail(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
