"""Files of these tests lie on the disk: there is much of them, and hosts have a /dev/shm of their own."""

import os

from tests.conftest import MEMORY


def pytest_configure() -> None:
    if os.environ.get("PYTEST_DEBUG_TEMPROOT") == str(MEMORY):
        del os.environ["PYTEST_DEBUG_TEMPROOT"]
