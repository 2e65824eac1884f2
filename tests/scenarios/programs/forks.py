"""Fork children that inherit an open connection: ``forks.py URL QUEUE CHILDREN``.

The parent consumes ten messages per child, which it publishes itself; the children close or drop
the connection, collect garbage and exit in an orderly way.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings

from greenkombu import Connection, Consumer, Producer, Queue

url, queue, children = sys.argv[1], sys.argv[2], int(sys.argv[3])
warnings.filterwarnings("ignore", category=DeprecationWarning)
connection = Connection(url)
got: list[object] = []
consumer = Consumer(
    connection.channel(),
    [Queue(queue, no_declare=True)],
    callbacks=[lambda body, message: (got.append(body), message.ack())],
)
consumer.consume()
producer = Producer(connection)
for number in range(children):
    for index in range(10):
        producer.publish(f"{number}-{index}", routing_key=queue)
    child = os.fork()
    if child == 0:
        if number % 3 == 0:
            connection.close()
        elif number % 3 == 1:
            del connection, consumer, producer
        else:
            connection.connect()
            Producer(connection).publish("mine", routing_key="nowhere")
        gc.collect()
        sys.exit(0)
    while len(got) < 10 * (number + 1):
        connection.drain_events(timeout=20)
    assert os.waitpid(child, 0)[1] == 0, f"child {number} failed"
sys.stdout.write(f"{len(got)} messages, {children} children\n")
consumer.cancel()
connection.close()
