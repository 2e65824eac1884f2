"""Publish a few messages and consume them.

    python examples/publish_consume.py [URL]

Without a URL everything happens inside this process (memory://). With one,
amqp://guest:guest@localhost// for example, it needs a running broker.
"""

from __future__ import annotations

import sys

from greenkombu import Connection, Consumer, Exchange, Producer, Queue

media = Exchange("example-media", type="direct")
videos = Queue("example-videos", exchange=media, routing_key="video")


def main(url: str = "memory://") -> None:
    received = []

    def on_video(body, message) -> None:
        received.append(body["name"])
        message.ack()  # from now on the broker does not deliver it again

    with Connection(url) as connection:
        producer = Producer(connection, exchange=media, serializer="json")
        for number in range(3):
            producer.publish({"name": f"video {number}"}, routing_key="video", declare=[videos])

        # The callbacks run in here, inside drain_events, and nowhere else.
        with Consumer(connection, queues=[videos], callbacks=[on_video], accept=["json"]):
            while len(received) < 3:
                connection.drain_events(timeout=5)

        videos(connection.default_channel).delete()
    assert received == ["video 0", "video 1", "video 2"], received
    print("received:", ", ".join(received))


if __name__ == "__main__":
    main(*sys.argv[1:])
