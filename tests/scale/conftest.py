"""Files of these tests lie on the disk: there is much of them, and hosts have a /dev/shm of their own."""

import os

import pytest

from tests.conftest import MEMORY


@pytest.hookimpl(trylast=True)  # behind tests/conftest.py, which sets it
def pytest_configure() -> None:
    if os.environ.get("PYTEST_DEBUG_TEMPROOT") == str(MEMORY):
        del os.environ["PYTEST_DEBUG_TEMPROOT"]
