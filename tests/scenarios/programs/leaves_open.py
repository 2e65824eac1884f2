"""End without closing anything: ``leaves_open.py URL QUEUE WHERE``, where it is referred to."""

from __future__ import annotations

import atexit
import builtins
import gc
import logging
import sys
import threading

url, queue, where = sys.argv[1:]
kept: list[object] = []
if where == "dropped behind our atexit":
    logging.getLogger("hub").setLevel(logging.ERROR)  # a lease was dropped
    atexit.register(lambda: (kept.clear(), gc.collect()))

# Only now: what is registered with atexit in here runs before the hook above.
from greenkombu import Connection, Consumer, Producer, Queue  # noqa: E402
from hub import get_environment  # noqa: E402


class Closes:
    """Closes what it has when it is collected, as programs do."""

    def __init__(self, *closable: object) -> None:
        self.closable = closable

    def __del__(self) -> None:
        for each in self.closable:
            each.close()  # type: ignore[attr-defined]


def work() -> list[object]:
    connection = Connection(url)
    consumer = Consumer(connection.channel(), [Queue("")], callbacks=[print])
    consumer.consume()
    pool = Connection(url).Pool(3)
    held, idle = pool.acquire(), pool.acquire()
    idle.default_channel  # noqa: B018 - opens it
    idle.release()
    producers = Connection(url).Pool(2)
    channel = held.default_channel
    Producer(channel).publish("last words", routing_key=queue)
    return [connection, consumer, pool, held, channel, producers, connection.channel()]


gc.disable()
kept += work()
if where == "cycles":
    kept.append(kept)
    del kept
elif where == "builtins":
    builtins.kept = kept  # type: ignore[attr-defined]  # cleared last of all
elif where == "channels before connections":
    builtins.kept = kept[:4]  # type: ignore[attr-defined]
    kept = [kept[6]]
    kept.append(kept)
elif where == "finalizers that close":
    kept = [Closes(kept[0], kept[4], kept[3], kept[6]), kept]
    kept.append(kept)
elif where == "a global beside the package":
    import greenkombu.pools

    alone = greenkombu.Connection(url)
    alone.connect()
    del kept
elif where == "tasks":
    environment = get_environment()

    def drain(connection: Connection, everything: list[object]) -> None:
        everything.append(threading.local())
        connection.drain_events()

    tasks = [environment.spawn(drain, kept[0], kept), environment.spawn(environment.sleep, 1000)]
    environment.sleep(0.05)
    del kept
