"""An echo server with thousands of clients on the bare hub, drained by one green task.

    python examples/hub_echo.py [default|gevent|eventlet] [clients] [rounds]

Everything runs in this process: the server, the clients, and a ticker that shows that the
other tasks of the program keep running.  One hub owns every descriptor; under gevent
and eventlet it is run by one greenlet, under default by one thread.
"""

from __future__ import annotations

import argparse
import time


def patch(environment: str) -> None:
    """Patch first, as a real gevent or eventlet program does."""
    if environment == "gevent":
        from gevent import monkey

        monkey.patch_all()
    elif environment == "eventlet":
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import eventlet

            eventlet.monkey_patch()


def allow_descriptors(wanted: int) -> None:
    """Raise the soft limit of open files if the hard limit lets us."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        if limit < wanted:
            raise SystemExit(f"needs {wanted} descriptors, the limit is {limit}: try ulimit -n")


class EchoServer:
    """Sends back what it receives; lives entirely in callbacks of the hub."""

    def __init__(self, loop, listener) -> None:
        self.loop = loop
        self.listener = listener
        self.connections = {}
        loop.add_reader(listener.fileno(), self.accept)

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except BlockingIOError:
                return
            connection.setblocking(False)
            fd = connection.fileno()
            self.connections[fd] = connection
            self.loop.add_reader(fd, self.echo, fd, connection)

    def echo(self, fd, connection) -> None:
        try:
            data = connection.recv(65536)
            if data:
                connection.send(data)  # a few bytes: the kernel takes them whole
                return
        except BlockingIOError:
            return
        except ConnectionError:
            pass
        self.loop.remove(fd)
        del self.connections[fd]
        connection.close()

    def close(self) -> None:
        self.loop.remove(self.listener.fileno())
        self.listener.close()
        for fd, connection in self.connections.items():
            self.loop.remove(fd)
            connection.close()


class Client:
    """Sends a number, waits for its echo, sends the next one."""

    def __init__(self, loop, connection, rounds, finished) -> None:
        self.loop = loop
        self.connection = connection
        self.left = rounds
        self.finished = finished
        loop.add_reader(connection.fileno(), self.answered)
        connection.send(b"%8d" % self.left)

    def answered(self) -> None:
        data = self.connection.recv(100)
        if int(data) != self.left:
            raise AssertionError(f"sent {self.left}, got {data!r}")
        self.left -= 1
        if self.left:
            self.connection.send(b"%8d" % self.left)
        else:
            self.loop.remove(self.connection.fileno())
            self.finished()


def main(environment: str = "default", clients: int = 2000, rounds: int = 5) -> None:
    patch(environment)
    allow_descriptors(2 * clients + 100)

    import hub

    env = hub.get_environment()
    make_socket = env.original("socket", "socket")  # not a green one: the hub waits for it
    loop = hub.Hub()
    drain = env.spawn(loop.run_forever)

    listener = make_socket()
    listener.setblocking(False)
    listener.bind(("127.0.0.1", 0))
    listener.listen(4096)
    done = env.Event()
    left = [clients]

    def finished() -> None:
        left[0] -= 1
        if not left[0]:
            done.set()

    sockets = []

    def start() -> None:
        for _ in range(clients):
            connection = make_socket()
            connection.connect(listener.getsockname())
            connection.setblocking(False)
            sockets.append(connection)

    ticks = [0]
    gap = [0.0]

    def tick() -> None:
        last = time.monotonic()
        while not done.is_set():
            env.sleep(0.005)
            now = time.monotonic()
            gap[0] = max(gap[0], now - last)
            last = now
            ticks[0] += 1

    start()
    server = loop.run_threadsafe(EchoServer, loop, listener, timeout=5)
    ticker = env.spawn(tick)
    began = time.monotonic()
    for connection in sockets:
        loop.call_soon_threadsafe(Client, loop, connection, rounds, finished)
    if not done.wait(60):
        raise SystemExit(f"{left[0]} clients got no answer within 60 s")
    took = time.monotonic() - began
    ticker.join(5)
    loop.run_threadsafe(server.close, timeout=5)
    loop.stop()
    drain.join(5)
    loop.close()
    for connection in sockets:
        connection.close()
    print(
        f"{env.name}/{loop.poller.name}: {clients} clients x {rounds} echoes in {took:.2f} s; "
        f"meanwhile another task ticked {ticks[0]} times, longest gap {gap[0] * 1000:.0f} ms"
    )


def number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    kinds = ["default", "gevent", "eventlet"]
    parser.add_argument("environment", nargs="?", choices=kinds, default="default")
    parser.add_argument("clients", nargs="?", type=number, default=2000)
    parser.add_argument("rounds", nargs="?", type=number, default=5, help="echoes of each client")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    main(given.environment, given.clients, given.rounds)
