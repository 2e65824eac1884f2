"""An empty broker for each test."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from greenkombu.connection import Connection
from greenkombu.transport import memory


@pytest.fixture(autouse=True)
def empty_broker() -> Iterator[None]:
    memory.broker.clear()
    yield
    memory.broker.clear()
    gc.collect()
    assert not len(memory.broker.registry), "consumers were left behind"


@pytest.fixture
def connection() -> Iterator[Connection]:
    with Connection("memory://") as made:
        yield made


@pytest.fixture
def channel(connection: Connection) -> Any:
    return connection.channel()
