"""One leg of a course on Ray Train: from the last checkpoint to a step, on as many workers as there are."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import errors
from ..errors import RunError, ShoalError
from ..storage import Folder, filesystem
from .loop import Course
from .loop import work as work_here

# Ray Train's own, where the user has not set them. A report is taken once a poll; a group that does not come up with what
# was there before a node was lost is asked for again after the second time (`training.md` has the measurements).
ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
}
FAILURES = 100  # restarts; spot machines go often, and each restart begins at the last checkpoint
POLL_SECONDS = 0.5
OUT_OF_MEMORY = (
    "a worker's memory does not hold a chunk. Lower --token-budget, take --gradient-checkpointing, --parallel fsdp or "
    "--lora-rank, and start in a new --output"
)
RESIZE_SECONDS = 60.0  # between looks for nodes that came back


@dataclass(frozen=True)
class Pool:
    """Workers of a run, at least and at most, and what each takes. threads: that a worker computes with, on CPUs."""

    minimum: int
    maximum: int
    cpus: float
    gpus: float
    threads: int

    def __str__(self) -> str:
        each = f"{self.gpus:g} GPU" if self.gpus else f"{self.threads} CPU"
        count = f"{self.minimum} to {self.maximum}" if self.minimum < self.maximum else f"{self.maximum}"
        return f"{count} worker{'s' * (self.maximum > 1)} of {each}"


def environment() -> None:
    """Set what Ray Train reads, before Ray starts."""
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})


def run_leg(course: Course, pool: Pool, keep: int, heard: Callable[[Sequence[dict[str, Any]]], None]) -> None:
    """Train to `course.until`. heard: called with the steps that are done, a few at a time.

    Raises RunError when the workers cannot run, and what a worker raised of ShoalError.
    """
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    fs, path = filesystem(course.output.url, course.output.options)
    board, scaling = _board(), _typeless(train.ScalingConfig)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"course": course, "board": board},
        torch_config=TorchConfig(backend=None if pool.gpus else "gloo"),
        scaling_config=scaling(
            num_workers=pool.maximum if pool.minimum == pool.maximum else (pool.minimum, pool.maximum),
            use_gpu=pool.gpus > 0,
            resources_per_worker={"CPU": pool.cpus} | ({"GPU": pool.gpus} if pool.gpus else {}),
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=train.RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=_arrow(fs),
            failure_config=train.FailureConfig(max_failures=FAILURES),
            checkpoint_config=train.CheckpointConfig(num_to_keep=keep),
        ),
    )
    with _Listener(board, heard):
        try:
            trainer.fit()
        except Exception as error:  # Ray Train wraps whatever befell the workers in types of its own
            raise _plain(error) from error


def _worker(settings: dict[str, Any]) -> None:
    """In every worker. What cannot be mended by trying again is written down instead of raised, and ends the run."""
    board = settings["board"]
    try:
        work_here(settings["course"], lambda rows: board.add.remote(rows) if rows else None)
    except ShoalError as error:
        board.fail.remote(type(error).__name__, str(error))
    except torch.OutOfMemoryError:
        board.fail.remote("RunError", OUT_OF_MEMORY)


def _typeless(kind: Any) -> Any:
    """ray.train.ScalingConfig is another class to a type checker, which does not know elastic runs."""
    return kind


def _board() -> Any:
    """An actor that keeps what the first rank tells until the driver asks."""
    import ray

    remote: Any = ray.remote(num_cpus=0)
    return remote(_Board).remote()


class _Board:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.failure: tuple[str, str] | None = None

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows

    def fail(self, kind: str, text: str) -> None:
        self.failure = (kind, text)

    def take(self) -> list[dict[str, Any]]:
        rows, self.rows = self.rows, []
        return rows

    def failed(self) -> tuple[str, str] | None:
        return self.failure


class _Listener:
    """Asks the board in a thread, and once more at the end; then raises what a worker wrote down."""

    def __init__(self, board: Any, heard: Callable[[Sequence[dict[str, Any]]], None]) -> None:
        self.board, self.heard = board, heard
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> "_Listener":
        self.thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        import ray

        self.ended.set()
        self.thread.join()
        self._take()
        failure = ray.get(self.board.failed.remote())
        ray.kill(self.board)
        if failure and kind is None:
            raise getattr(errors, failure[0], RunError)(failure[1])

    def _listen(self) -> None:
        while not self.ended.wait(POLL_SECONDS):
            self._take()

    def _take(self) -> None:
        import ray

        rows = ray.get(self.board.take.remote())
        if rows:
            self.heard(rows)


def _arrow(fs: Any) -> Any:
    """The fsspec filesystem as pyarrow's, so that checkpoints go where and how everything else does."""
    from fsspec.implementations.local import LocalFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return None if isinstance(fs, LocalFileSystem) else PyFileSystem(FSSpecHandler(fs))


def _plain(error: Exception) -> RunError:
    failures = getattr(error, "worker_failures", None) or {}
    first: BaseException = next(iter(failures.values()), error)
    while (inner := getattr(first, "cause", None) or first.__cause__) is not None and str(inner):
        first = inner
    return RunError(f"the workers could not train: {type(first).__name__}: {str(first)[-1500:]}")


def checkpoints(output: Folder) -> Folder:
    return output.below("checkpoints")
