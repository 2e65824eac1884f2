"""A consuming process of a soak; see `main` for its arguments."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from tests.run import ENVIRONMENTS


def main(environment: str, folder: str, name: str, settings: str) -> None:
    """Consume until the file ``stop`` is in the folder, or the parent has ended.

    Args:
        environment: as for `tests.run`.
        folder: of the ledger.
        name: of this process, for its record.
        settings: JSON with `url`, `options` of the connection, `queues` and their `arguments`.
    """
    ENVIRONMENTS[environment]()

    from greenkombu import Connection, Queue
    from greenkombu.mixins import ConsumerMixin
    from hub.environment import get_environment
    from tests.soak.ledger import Record
    from tests.support.leaks import Census, settle, warm_up

    given = json.loads(settings)
    record = Record(Path(folder, f"{name}.record"))
    stop = Path(folder, "stop")
    parent = os.getppid()

    class Worker(ConsumerMixin):
        connection = Connection(given["url"], **given["options"])

        def get_consumers(self, consumer_class: Any, channel: Any) -> list[Any]:
            queues = [
                Queue(queue, queue_arguments=arguments)
                for queue, arguments in given["queues"].items()
            ]
            return [consumer_class(queues, on_message=self.take, prefetch_count=50)]

        def take(self, message: Any) -> None:
            if random.random() < 0.005:
                message.requeue()
                return
            redelivered = bool((message.delivery_info or {}).get("redelivered"))
            record.delivered(message.payload["number"], redelivered)
            message.ack()

        def on_iteration(self) -> None:
            if stop.exists() or os.getppid() != parent:
                self.should_stop = True

    warm_up()
    before = Census()
    worker = Worker()
    try:
        worker.run(safety_interval=0.2)
        worker.connection.close()
    except BaseException as error:
        record.problem(f"consumer {name} ended by {error!r}")
        raise
    for line in settle(before, get_environment().sleep):
        record.problem(f"consumer {name} left behind: {line}")
    record.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
