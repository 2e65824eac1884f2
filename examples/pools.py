"""Publish from many tasks through a pool of producers.

    python examples/pools.py [URL]

A pool belongs to a set of connection parameters. Tasks get a producer first come, first served;
whoever waits longer than its timeout gets an error.
"""

from __future__ import annotations

import sys

import hub
from greenkombu import Connection, Queue, pools
from greenkombu.exceptions import LimitExceeded


def main(url: str = "memory://", tasks: int = 50, each: int = 4) -> None:
    env = hub.get_environment()
    queue = Queue("example-pools")
    connection = Connection(url)  # parameters only; nothing is opened
    pools.set_limit(5)

    def publish(number: int) -> None:
        for index in range(each):
            with pools.producers[connection].acquire(block=True, timeout=10) as producer:
                producer.publish([number, index], routing_key=queue.name, declare=[queue])

    running = [env.spawn(publish, number) for number in range(tasks)]
    for task in running:
        task.result(30)
    print(pools.producers[connection])

    # A pool that is used up says so at once, or after the timeout.
    pool = connection.Pool(limit=1)
    with pool.acquire() as held:
        try:
            pool.acquire(block=True, timeout=0.05)
        except LimitExceeded as error:
            print("full:", error)
        taken = queue(held.default_channel).purge()
        queue(held.default_channel).delete()
    assert taken == tasks * each, taken
    pool.force_close_all()
    pools.reset()
    print(f"{taken} messages from {tasks} tasks over at most {pools.get_limit()} connections")


if __name__ == "__main__":
    main(*sys.argv[1:])
