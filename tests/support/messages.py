"""The driver's messages, as a test sees them."""

import logging
from collections.abc import Iterator

import pytest

LOGGER = logging.getLogger("shoal")


class _List(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def listen() -> list[str]:
    """A list that gets every message of the driver from now on, until the test ends."""
    handler = _List()
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(handler)
    return handler.messages


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """After each test nothing listens any more."""
    yield
    for handler in [each for each in LOGGER.handlers if isinstance(each, _List)]:
        LOGGER.removeHandler(handler)
