"""What the tests of the Redis transport share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from greenkombu.utils.private_redis import PrivateRedis
from tests.greenkombu.redis.support import Database, Wires


@pytest.fixture
def wires() -> Iterator[Wires]:
    """Makes wires, and ends them after the test."""
    made = Wires()
    yield made
    made.close()


@pytest.fixture
def database(redis: PrivateRedis) -> Iterator[Database]:
    """An empty database of the shared server, with connections that are closed after the test."""
    made = Database(redis)
    yield made
    made.close()
