"""The Ray side of a run: join a cluster or start one, quiet, with the variables that every process needs."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..storage.filesystem import CHECKSUM_ENVIRONMENT

# Of every process of a run, where the user has not set them.
ENVIRONMENT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # C++ lines that a user can do nothing about
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # `ray job submit` may have been given some of the variables we forward
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # torch on CPUs keeps a compiled kernel for each of the last 1,024 batch shapes, twice, and packed batches never
    # repeat a shape: 160 MiB a worker that buy nothing. One batch needs fewer than 16.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "LRU_CACHE_CAPACITY": "16",
}
FORWARDED = ("AWS_", "HF_", "GOOGLE_", "FSSPEC_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def connect() -> None:
    """Join the cluster RAY_ADDRESS or `ray job submit` names, else one on this machine; quiet either way."""
    os.environ.update({k: v for k, v in (ENVIRONMENT | CHECKSUM_ENVIRONMENT).items() if k not in os.environ})
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", "3")  # for ever by default: a shard too large would never be given up
    warnings.filterwarnings("ignore", category=FutureWarning)
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):
        raise RunError(
            f"RAY_ADDRESS={address} is for `ray job submit`. A driver joins at HOST:6379: unset it, or set that"
        )
    joins = _joins()
    if not joins:
        _keep_to_loopback()
    try:
        with _silent_stderr():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **_surroundings(joins))
    except ConnectionError as error:
        raise RunError(f"no Ray cluster answers at {address}: {error}. Start it, or unset RAY_ADDRESS") from error


def _surroundings(joins: bool) -> dict[str, Any]:
    """What ray.init is told beside its address.

    A cluster of our own inherits the variables, and starts 3 s sooner without a runtime environment, which would waste
    the processes that Ray starts ahead, and without a dashboard. Joined from outside a job, it is sent this package.
    """
    if not joins:
        return {"include_dashboard": False}
    variables = {k: v for k, v in os.environ.items() if k.startswith(FORWARDED) or k in ENVIRONMENT}
    environment: dict[str, Any] = {"env_vars": variables}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        environment["py_modules"] = [str(Path(__file__).parents[1])]
    return {"runtime_env": environment}


def _keep_to_loopback() -> None:
    """A cluster of our own is for this machine: without this its servers listen on every address."""
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # of the processes that it starts
    ray_constants.ENABLE_RAY_CLUSTER = False


def _joins() -> bool:
    """Whether there is a cluster to join: RAY_ADDRESS names one, or `ray start` left one on this machine."""
    try:
        from ray._private.services import canonicalize_bootstrap_address

        return canonicalize_bootstrap_address(None) is not None  # type: ignore[arg-type]
    except Exception:  # a private call, whose absence costs only seconds at the start
        return True


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what Ray's C++ prints while it starts; what goes wrong there comes as an exception."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
