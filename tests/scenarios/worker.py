"""A program that consumes for ever, as users write it."""

from __future__ import annotations

from typing import Any

from greenkombu.connection import Connection
from greenkombu.entity import Queue
from greenkombu.messaging import Consumer
from greenkombu.mixins import ConsumerMixin
from hub.environment import Environment
from tests.support.tasks import LONG

__all__ = ["Worker"]


class Worker(ConsumerMixin):
    """Consumes one queue in a task of its own."""

    def __init__(self, env: Environment, connection: Connection, queue: str) -> None:
        self.connection = connection
        self.queue = queue
        self.got: list[Any] = []
        self.errors: list[BaseException] = []
        self.ready = 0
        self.should_stop = False
        self._env = env
        self.task = env.spawn(self.run, safety_interval=0.2)

    def get_consumers(self, consumer_class: Any, channel: Any) -> list[Consumer]:
        return [consumer_class([Queue(self.queue, no_declare=True)], on_message=self.take)]

    def take(self, message: Any) -> None:
        self.got.append(message.body)
        message.ack()

    def on_consume_ready(self, *args: Any, **kwargs: Any) -> None:
        self.ready += 1

    def on_connection_error(self, exc: BaseException, interval: float) -> None:
        self.errors.append(exc)

    def stop(self) -> None:
        self.should_stop = True
        assert self.task.join(LONG), "the worker does not stop"
        self.connection.close()
