"""What a chaos run counts; shared by its threads."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

WORKERS, SERVERS = ("actor", "task"), ("gateway", "whole server")


@dataclass
class Tally:
    """Counts so far. `target`: kills wanted of each kind; `kinds`: what can be killed here; `shards`: of the plan."""

    target: int
    kinds: tuple[str, ...]
    shards: int
    kills: Counter[str] = field(default_factory=Counter)  # "driver", WORKERS, SERVERS
    starts: int = 0  # of the driver
    barren: int = 0  # starts that published nothing before they were killed, in flight or not
    exits: Counter[int] = field(default_factory=Counter)  # of drivers that nobody killed
    last_lines: dict[int, Counter[str]] = field(default_factory=dict)
    tracebacks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    orphan_seconds: float = 0.0  # the longest that a worker outlived its driver
    parts: int = 0  # listed now
    over: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)

    def killed(self) -> dict[str, int]:
        """Kills by kind: driver, worker, server."""
        sums = {
            "driver": self.kills["driver"],
            "worker": sum(self.kills[name] for name in WORKERS),
            "server": sum(self.kills[name] for name in SERVERS),
        }
        return {kind: sums[kind] for kind in self.kinds}

    def wanted(self, kind: str) -> bool:
        """Whether more kills of this kind are to come."""
        return self.killed()[kind] < self.target

    def enough(self) -> bool:
        return not any(self.wanted(kind) for kind in self.kinds)

    def late(self, kind: str) -> bool:
        """Whether the parts are ahead of the kills of this kind: the next must not wait, so that they spread over the run."""
        return self.wanted(kind) and self.parts > self.shards * (0.02 + 0.8 * self.killed()[kind] / self.target)

    def fail(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
