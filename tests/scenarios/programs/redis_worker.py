"""Consume a queue and note what happens: ``redis_worker.py URL QUEUE LOG OPTIONS``.

OPTIONS is JSON: `transport` options; `prefetch`; `seconds` that a message takes before it is
acknowledged, null for ever; `drains`, after how many messages it no longer drains.  The
lines of LOG: ``ready -``, ``got BODY``, ``again BODY`` for what was
delivered before, ``done BODY`` just before the acknowledgement.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

from greenkombu import Connection, Consumer, Queue
from hub import get_environment

url, queue, log, text = sys.argv[1:]
options = json.loads(text)
environment = get_environment()
notes = open(log, "a", buffering=1)  # noqa: SIM115 - as long as the process lives
got: list[Any] = []


def note(word: str, body: bytes) -> None:
    notes.write(f"{word} {body.decode()}\n")


def work(message: Any) -> None:
    environment.sleep(options["seconds"])
    note("done", message.body)
    message.ack()


def take(message: Any) -> None:
    got.append(message)
    note("again" if message.delivery_info.get("redelivered") else "got", message.body)
    if options.get("seconds", 0) == 0:
        note("done", message.body)
        message.ack()
    elif options["seconds"] is not None:
        environment.spawn(work, message)


connection = Connection(url, transport_options=options.get("transport", {}))
channel = connection.channel()
channel.basic_qos(0, options.get("prefetch", 0), False)
consumer = Consumer(channel, [Queue(queue, no_declare=True)], on_message=take)
consumer.consume()
if options.get("drains") != 0:
    with contextlib.suppress(TimeoutError):
        connection.drain_events(timeout=0.01)
note("ready", b"-")
while len(got) < options.get("drains", 1_000_000):
    connection.drain_events(timeout=None)
while True:
    environment.sleep(1000)
