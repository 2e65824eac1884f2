"""What private servers of all kinds need: free ports, a guarded process, bounded waits.

Everything waits by polling with a `sleep` that the caller gives, so that it works, and lets other
green threads run, in every environment. No blocking wait for a process is used: under gevent that
needs a child watcher, and a program may be green without being patched.
"""

from __future__ import annotations

import io
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    import subprocess
    from types import TracebackType

__all__ = [
    "GuardedProcess",
    "PrivateBrokerError",
    "PrivateServer",
    "ServerState",
    "TLSFiles",
    "free_ports",
    "late_sleep",
    "wait_exit",
    "wait_stopped",
]

#: First and last port that are tried: not privileged, few well-known services, and below the range
#: from which Linux takes the local ports of outgoing connections (32768 and up).
PORT_RANGE = (20000, 32767)

#: Seconds between two looks at something that is awaited.
POLL_INTERVAL = 0.02


class PrivateBrokerError(RuntimeError):
    """The private broker could not do what was asked; the text carries what its log says."""


@dataclass(frozen=True)
class TLSFiles:
    """PEM files for a TLS listener.

    Args:
        ca: certificates that clients' certificates are checked against.
        certificate: the server's certificate chain.
        key: the server's private key.
        external_user: ask every client for a certificate; RabbitMQ also offers the EXTERNAL
            mechanism, and gets this user, for a client certificate with that common name.
    """

    ca: Path
    certificate: Path
    key: Path
    external_user: str | None = None


class GuardedProcess:
    """A server's process under a guard (`greenkombu.utils._guard`) that ends it with this one.

    Args:
        command: the server and its arguments.
        environment: its environment variables.
        folder: its working folder, removed by the guard when this process ends without a kill.
        log: the file to which its output is appended.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path
    ) -> None:
        import subprocess

        guard = Path(__file__).with_name("_guard.py")
        # Closed as files: gevent replaces os.close() by one that waits for the next loop turn.
        ends = os.pipe()
        reader, self._pipe = io.FileIO(ends[0], "r"), io.FileIO(ends[1], "w")
        try:
            with open(log, "ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(guard), str(folder), *command],
                    stdin=reader,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    cwd=folder,
                    start_new_session=True,
                )
        except BaseException:
            self._pipe.close()
            raise
        finally:
            reader.close()

    @property
    def status(self) -> int | None:
        """The server's exit status, None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float, sleep: Callable[[float], object]) -> bool:
        """Wait for the end; after `timeout` seconds kill the server and return False."""
        deadline = time.monotonic() + timeout
        while self._process.poll() is None:
            if time.monotonic() > deadline:
                # Through the guard: its own death would leave the server alone.
                self.kill(sleep)
                return False
            sleep(POLL_INTERVAL)
        self._pipe.close()
        return True

    def kill(self, sleep: Callable[[float], object]) -> None:
        """Let the guard kill the server with all that it started, and wait until that is done."""
        try:
            self._pipe.write(b"k")
        except (BrokenPipeError, ValueError):  # the server has ended, and the guard with it
            pass
        self._pipe.close()
        # The guard needs milliseconds; the bound is for a machine that hardly runs any more.
        wait_exit(self._process, 30.0, sleep)


class ServerState:
    """What a private server has to give back: its processes and its folder.

    Apart from the object that users hold, so that the finalizer of that does not keep it alive.

    Args:
        name: the kind of server, part of the folder's name.
        sleep: the wait between two looks.
    """

    def __init__(self, name: str, sleep: Callable[[float], object]) -> None:
        self.name = name
        self.sleep = sleep
        self.folder: Path | None = None
        self.processes: dict[str, GuardedProcess] = {}

    def make_folder(self) -> Path:
        """Return the server's temporary folder, made at the first call."""
        import tempfile

        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix=f"greenkombu-{self.name}-"))
        return self.folder

    def start(self, role: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the process of that role, unless it runs."""
        if not self.running(role):
            folder = self.make_folder()
            log = folder / "server.log"
            self.processes[role] = GuardedProcess(command, environment, folder, log)

    def running(self, role: str) -> bool:
        """Return whether the process of that role was started and has not ended."""
        return role in self.processes and self.processes[role].status is None

    def kill_all(self) -> None:
        """Kill every process and wait until all have ended."""
        while self.processes:
            _, process = self.processes.popitem()
            process.kill(self.sleep)

    def destroy(self, owner_pid: int) -> None:
        """Kill every process and remove the folder, but not from a forked child."""
        if os.getpid() != owner_pid:
            return
        import shutil

        self.kill_all()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


_Server = TypeVar("_Server", bound="PrivateServer")


class PrivateServer:
    """One server in a temporary folder, started by `start()` and removed by `close()`.

    What does not depend on the kind of server: a subclass says how it is launched and how one sees
    that it accepts, and sees to it that the server writes its process id to the file `pid`.

    Args:
        name: the kind of server, part of the folder's name.
        sleep: the wait between two looks, in seconds; the default is `time.sleep`, looked up at
            each call. Pass `hub.get_environment().sleep` in a program that is green but unpatched.
        timeout: seconds that each step (start, stop, a control command) may take.

    After an error of `start()` nothing is left running. Methods that need a running server raise
    `PrivateBrokerError` when there is none.

    Attributes:
        port: on which it listens, chosen at the first start; 0 before.
    """

    #: What the log says when the port was taken by somebody else.
    PORT_TAKEN: ClassVar[str]

    def __init__(
        self, name: str, *, sleep: Callable[[float], object] | None, timeout: float
    ) -> None:
        import weakref

        self.timeout = timeout
        self.port = 0
        self._sleep = sleep or late_sleep
        self._frozen = False
        self._state = ServerState(name, self._sleep)
        self._finalizer = weakref.finalize(self, self._state.destroy, os.getpid())

    # -- life ------------------------------------------------------------------------------------

    def start(self: _Server) -> _Server:
        """Start the server, on the same ports and data as before, and wait until it accepts.

        Returns:
            The server itself.

        Raises:
            PrivateBrokerError: it is not installed, it ended, or it did not accept a connection
                within the timeout.
        """
        if self.running:
            return self
        first = not self.port
        for attempt in (1, 2, 3):
            try:
                self.launch()
                self.wait_ready()
                return self
            except BaseException as error:  # also a Timeout or a kill of the waiting greenlet
                self._state.kill_all()
                # A probed port can be taken by somebody else before the server binds it.
                taken = isinstance(error, PrivateBrokerError) and self.PORT_TAKEN in self.logs()
                if attempt == 3 or not first or not taken:
                    raise
                (self.folder / "server.log").unlink()
                self.port = 0
        raise AssertionError("unreachable")

    def launch(self) -> None:
        """Start the server's process, and do not wait until it accepts; raises as `start`."""
        if not self._finalizer.alive:
            raise PrivateBrokerError(f"this {type(self).__name__} was closed; make a new one")
        self._launch()

    def _launch(self) -> None:
        raise NotImplementedError

    def wait_ready(self) -> None:
        """Wait until a launched server accepts connections; raises as `start`."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the server in an orderly way and keep its data; SIGKILL after the timeout."""
        if not self.running:
            return
        self.thaw()
        self._signal("SIGTERM")
        self._state.processes["server"].wait(self.timeout, self._sleep)

    def kill(self) -> None:
        """End the server with SIGKILL, as a crash would, and keep its data."""
        if not self.running:
            return
        self._signal("SIGKILL")
        self._frozen = False
        self._state.processes["server"].wait(self.timeout, self._sleep)

    def restart(self, *, pause: float = 0.0) -> None:
        """Stop the server and start it on the same ports and data.

        Args:
            pause: seconds between the two.
        """
        self.stop()
        if pause > 0:
            self._sleep(pause)
        self.start()

    def freeze(self) -> None:
        """Stop the process with SIGSTOP: connections stay open and nothing answers."""
        self._signal("SIGSTOP")
        self._frozen = True
        wait_stopped(self.pid, self._sleep)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        if self._frozen:
            self._signal("SIGCONT")
            self._frozen = False

    def close(self) -> None:
        """End the server at once and remove its folder; idempotent."""
        self._finalizer()

    def __enter__(self: _Server) -> _Server:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} port={self.port} {self._state_name()}>"

    def _state_name(self) -> str:
        return "frozen" if self._frozen else "running" if self.running else "stopped"

    # -- facts -----------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the server process exists; a frozen one does."""
        return self._state.running("server")

    @property
    def pid(self) -> int:
        """The process id of the server itself, which is a child of its guard."""
        try:
            return int((self.folder / "pid").read_text())
        except (OSError, ValueError) as error:
            raise PrivateBrokerError(f"{self!r} has written no process id") from error

    @property
    def folder(self) -> Path:
        """The temporary folder that holds configuration, data and log."""
        if self._state.folder is None:
            raise PrivateBrokerError(f"this {type(self).__name__} was not started")
        return self._state.folder

    def logs(self) -> str:
        """Return everything that the server has logged since its first start."""
        try:
            return (self.folder / "server.log").read_text(errors="replace")
        except (OSError, PrivateBrokerError):
            return ""

    # -- for subclasses --------------------------------------------------------------------------

    def _await(self, role: str, ready: Callable[[], bool]) -> None:
        """Look at `ready` until it is true, the process has ended, or the timeout is over."""
        deadline = time.monotonic() + self.timeout
        while not ready():
            status = self._state.processes[role].status
            if status is not None:
                problem = f"the {role} ended with status {status} while it started"
            elif time.monotonic() > deadline:
                problem = f"the {role} did not answer within {self.timeout:g} s"
            else:
                self._sleep(POLL_INTERVAL)
                continue
            raise PrivateBrokerError(f"{self!r}: {problem}; its log says:\n{self._log_end()}")

    def _signal(self, name: str) -> None:
        import signal

        if not self.running:
            raise PrivateBrokerError(f"{name}: {self!r} does not run")
        os.kill(self.pid, signal.Signals[name])

    def _log_end(self) -> str:
        """Return the part of the log that tells why the server did not start."""
        return "\n".join(self.logs().splitlines()[-10:])


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface on which nothing listens at this moment.

    Args:
        count: how many different ports.

    Raises:
        PrivateBrokerError: too few of a thousand random ports are free.
    """
    import socket

    ports: list[int] = []
    for _ in range(1000):
        if len(ports) == count:
            return ports
        # Not the shared generator: a program that seeds it would always get the same ports.
        port = random.SystemRandom().randint(*PORT_RANGE)
        probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        finally:
            probe.close()
        if port not in ports:
            ports.append(port)
    raise PrivateBrokerError(f"no {count} free ports on 127.0.0.1 within {PORT_RANGE}")


def late_sleep(seconds: float) -> None:
    """Sleep with `time.sleep` as it is now: patching may have come after the import."""
    time.sleep(seconds)


def wait_stopped(pid: int, sleep: Callable[[float], object], timeout: float = 30.0) -> None:
    """Wait until a process that was sent SIGSTOP has stopped.

    The signal only asks for it: threads that run on other processors at that moment go on for a
    while, and may still answer.

    Args:
        pid: of the process.
        sleep: the wait between two looks.
        timeout: seconds.

    Raises:
        PrivateBrokerError: it still runs.
    """
    until = time.monotonic() + timeout
    while not _is_stopped(pid):
        if time.monotonic() > until:
            raise PrivateBrokerError(f"process {pid} did not stop within {timeout:g} s of SIGSTOP")
        sleep(0.001)


def _is_stopped(pid: int) -> bool:
    """Tell whether all threads of a process are stopped, or gone; true where nobody can know."""
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            # proc(5): the state follows the name, which is in parentheses.
            text = Path(f"/proc/{pid}/task/{thread}/stat").read_text(errors="replace")
            if text.rpartition(")")[2].split()[0] not in "TtZX":
                return False
    except OSError:
        return not os.path.exists(f"/proc/{pid}/task")
    return True


def wait_exit(
    process: subprocess.Popen[bytes], timeout: float, sleep: Callable[[float], object]
) -> bool:
    """Wait until a process, the leader of its group, has ended.

    Args:
        process: the process.
        timeout: seconds after which its group is killed.
        sleep: the wait between two looks.

    Returns:
        False if it had to be killed.
    """
    import signal

    deadline = time.monotonic() + timeout
    in_time = True
    while process.poll() is None:
        if in_time and time.monotonic() > deadline:
            in_time = False
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # macOS: EPERM for zombies
                pass
        sleep(POLL_INTERVAL)
    return in_time
