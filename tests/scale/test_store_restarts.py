"""Writers while a store dies, as a whole and its front alone, several times. Run by `make scale`."""

import pytest

from tests.storage.test_retry import write_through_deaths


@pytest.mark.parametrize(("deaths", "count"), [("kill", 3), ("kill_all", 1)])
def test_writers_survive_restarts_of_the_store(server, bucket, deaths, count):
    """Writers continue while the store is killed and started again; every published object is stored."""
    write_through_deaths(server, bucket, deaths, count)
