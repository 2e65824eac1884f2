"""Hold 100 messages when SIGTERM comes, and end by a deadline: ``terminated.py URL QUEUE``."""

from __future__ import annotations

import signal
import sys

from greenkombu import Connection, Consumer, Queue
from greenkombu.drain import DrainLoop
from hub import get_environment

url, queue = sys.argv[1:]
environment = get_environment()
connection = Connection(url)
channel = connection.channel()
channel.basic_qos(0, 100, False)
held: list[object] = []
acked: list[object] = []


def work(message: object) -> None:
    environment.sleep(0.5)
    message.ack()  # type: ignore[attr-defined]
    acked.append(message)


def take(message: object) -> None:
    held.append(message)
    if len(held) == 100:
        sys.stdout.write("100 in flight\n")
        sys.stdout.flush()


consumer = Consumer(channel, [Queue(queue, no_declare=True)], on_message=take)
consumer.consume()
loop = DrainLoop()
loop.join(connection)
signal.signal(signal.SIGTERM, lambda *_: loop.stop())
loop.run_forever()
for message in held:
    environment.spawn(work, message)
loop.close(deadline=4.0)
connection.close()
assert len(held) == 100, f"{len(held) - 100} were delivered after the signal"
sys.stdout.write(f"acked {len(acked)}\n")
