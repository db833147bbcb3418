"""One interval of a training on Ray Train: from the last checkpoint to a step, on as many workers as there are."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .. import errors
from ..engine.workers import WorkerPlan
from ..errors import RunError, ShoalError, StorageError
from ..storage.filesystem import filesystem
from ..storage.folder import Folder
from .loop import train_worker
from .train_run import OUT_OF_MEMORY, TrainRun

# Ray Train's own variables, where the user has not set them. A report is taken once a poll; a worker group that does not come
# up with the nodes of before a loss is requested again after the timeout.
ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
}
FAILURES = 1000  # restarts; spot machines go often, and each restart begins at the last checkpoint
IDLE_STARTS = 6  # in a row without a step; more are no machine's fault
POLL_SECONDS = 0.5
UPLOAD_ATTEMPTS = 8
RESIZE_SECONDS = 60.0  # between looks for nodes that came back


def set_environment() -> None:
    """Set what Ray Train reads, before Ray starts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def run_interval(run: TrainRun, workers: WorkerPlan, report: Callable[[Sequence[dict[str, Any]]], None]) -> None:
    """Train to `run.until`. report: gets the metrics of finished steps, a few at a time.

    Raises RunError when the workers cannot run, and a ShoalError that a worker raised.
    """
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    fs, path = filesystem(run.output.url, _retrying_options(run.output))
    least, most = workers.minimum, workers.maximum
    scaling: Any = train.ScalingConfig  # another class to a type checker, which does not know elastic runs
    board = _board()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"run": run, "board": board},
        torch_config=TorchConfig(backend=None if workers.gpus else "gloo"),
        scaling_config=scaling(
            num_workers=most if least == most else (least, most),
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {}),
            label_selector=dict(workers.labels) or None,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=train.RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=_arrow(fs),
            failure_config=train.FailureConfig(max_failures=FAILURES),
            checkpoint_config=train.CheckpointConfig(num_to_keep=run.config.keep),
        ),
    )
    with _listening(board, report):
        try:
            trainer.fit()
        except Exception as error:  # Ray Train wraps every error of the workers in types of its own
            raise _plain(error) from error


def _worker(settings: dict[str, Any]) -> None:
    """Run the loop in one worker. An error that a restart cannot mend is written on the board and raised; the workers that Ray
    then starts read it there and return, which ends the run. One that returned alone would let the others wait for it."""
    import ray
    from ray import train

    board = settings["board"]
    first = train.get_context().get_world_rank() == 0
    if ray.get(board.begin.remote() if first else board.failed.remote()):
        return
    try:
        train_worker(settings["run"], board.add.remote)
    except StorageError as error:  # a store that was away longer than the retries: worth another start
        board.note.remote(str(error))
        raise
    except ShoalError as error:
        ray.get(board.fail.remote(type(error).__name__, str(error)))
        raise
    except torch.OutOfMemoryError:
        ray.get(board.fail.remote("RunError", OUT_OF_MEMORY))
        raise
    except Exception as error:  # of a rank that died, or a mistake of ours: the board counts starts to tell them apart
        board.note.remote(f"{type(error).__name__}: {error}")
        raise


def _board() -> Any:
    """An actor on this node, whose life is the driver's: it keeps the first rank's metrics until the driver takes them."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind: Any = ray.remote(_Board)
    return kind.options(num_cpus=0, scheduling_strategy=here).remote()


class _Board:
    """rows: metrics that were not taken yet. idle: starts since the last finished step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.failure: tuple[str, str] | None = None
        self.idle, self.last = 0, "none"

    def begin(self) -> tuple[str, str] | None:
        self.idle += 1
        if self.idle > IDLE_STARTS:
            why = f"the workers died {IDLE_STARTS} times without a step between. Their last error: {self.last}"
            self.fail("RunError", why)
        return self.failure

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        self.idle = 0

    def note(self, text: str) -> None:
        self.last = text[-1000:]

    def fail(self, kind: str, text: str) -> None:
        self.failure = self.failure or (kind, text)

    def take(self) -> list[dict[str, Any]]:
        rows, self.rows = self.rows, []
        return rows

    def failed(self) -> tuple[str, str] | None:
        return self.failure


@contextmanager
def _listening(board: Any, report: Callable[[Sequence[dict[str, Any]]], None]) -> Iterator[None]:
    """Poll the board in a thread, and once more at the end; then raise the error that a worker wrote there."""
    import ray

    ended = threading.Event()

    def take() -> None:
        if rows := ray.get(board.take.remote()):
            report(rows)

    def listen() -> None:
        while not ended.wait(POLL_SECONDS):
            take()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        take()
        failure = ray.get(board.failed.remote())
        ray.kill(board)
        if failure:  # it says more than Ray Train's error
            raise getattr(errors, failure[0], RunError)(failure[1])


def _retrying_options(output: Folder) -> dict[str, Any]:
    """Options of a filesystem that retries by itself: Ray's uploads do not go through our own retries."""
    if not output.url.startswith(("s3://", "s3a://")):
        return output.options
    return output.options | {"config_kwargs": {"retries": {"total_max_attempts": UPLOAD_ATTEMPTS, "mode": "standard"}}}


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
