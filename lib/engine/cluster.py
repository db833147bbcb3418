"""Join a Ray cluster or start one, quietly, with the environment variables that every process of a run needs."""

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

# Variables of every process of a run, unless the user has set them.
ENVIRONMENT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # other C++ lines do not help a user
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # `ray job submit` may set some of the forwarded variables, too
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # On CPUs torch caches a compiled kernel for each of the last 1,024 batch shapes, twice: 160 MiB a worker for packed batches,
    # which never repeat a shape. One batch needs fewer than 16.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "LRU_CACHE_CAPACITY": "16",
}
# Prefixes of variables that workers get from the driver: credentials, caches, proxies.
FORWARDED = ("AWS_", "HF_", "GOOGLE_", "FSSPEC_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def connect() -> None:
    """Join the cluster that RAY_ADDRESS or `ray job submit` names, else start one on this machine. Raises RunError."""
    os.environ.update({k: v for k, v in (ENVIRONMENT | CHECKSUM_ENVIRONMENT).items() if k not in os.environ})
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", "3")  # without end by default: a large shard would not be quarantined
    warnings.filterwarnings("ignore", category=FutureWarning)
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):
        raise RunError(
            f"RAY_ADDRESS={address} is for `ray job submit`. A driver joins at HOST:6379: unset it, or set that"
        )
    joins = _can_join()
    if not joins:
        _listen_on_loopback()
    try:
        with _silent_stderr():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **_init_arguments(joins))
    except ConnectionError as error:
        raise RunError(f"no Ray cluster answers at {address}: {error}. Start it, or unset RAY_ADDRESS") from error


def _init_arguments(joins: bool) -> dict[str, Any]:
    """Keyword arguments for ray.init. A cluster that is joined from outside a job gets this package.

    A cluster that starts here inherits the variables. Without a runtime environment, which would waste the processes that Ray
    starts ahead, and without a dashboard it starts 3 s sooner.
    """
    if not joins:
        return {"include_dashboard": False}
    variables = {k: v for k, v in os.environ.items() if k.startswith(FORWARDED) or k in ENVIRONMENT}
    environment: dict[str, Any] = {"env_vars": variables}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        environment["py_modules"] = [str(Path(__file__).parents[1])]
    return {"runtime_env": environment}


def _listen_on_loopback() -> None:
    """Let the servers of a cluster that starts here listen on 127.0.0.1 only; by default they listen on every address."""
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # of Ray's child processes
    ray_constants.ENABLE_RAY_CLUSTER = False


def _can_join() -> bool:
    """Whether a cluster can be joined: RAY_ADDRESS names one, or `ray start` started one on this machine."""
    try:
        from ray._private.services import canonicalize_bootstrap_address

        return canonicalize_bootstrap_address(None) is not None  # type: ignore[arg-type]
    except Exception:  # a private call of Ray; without it the start only takes some seconds more
        return True


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop the lines that Ray's C++ prints while it starts; its errors come as exceptions."""
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
