"""Keep a private server alive exactly as long as the process that started it.

Run as a program (``python -I -S _guard.py FOLDER COMMAND...``) between a test or a demo and the
server it needs. A process that is ended with SIGKILL, or by a watchdog's ``_exit``, cleans nothing
up, and a forgotten broker then keeps its memory and ports for ever. The guard waits on its standard
input, a pipe whose other end only the starting process holds: the kernel closes it however that
process ends, and the guard kills the server with everything that the server started. When the
server ends first, what it left behind is killed too, and the guard exits with the server's status.

A byte on the pipe before it is closed says that the starting process is alive and looks after the
server's folder; without it the guard removes that as well.

Only the standard library is used and nothing of greenkombu, because no package is importable in
isolated mode.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

#: prctl(2): orphaned descendants become our children, also those that left the process group.
PR_SET_CHILD_SUBREAPER = 36


def main(folder: str, command: Sequence[str]) -> int:
    """Run command in a process group of its own until it ends or standard input is closed.

    Args:
        folder: what to remove when standard input is closed without a word.
        command: the program and its arguments; output goes where the guard's own output goes.

    Returns:
        The command's exit status, 128 + n when signal n ended it, 127 when it cannot be run.
    """
    import select
    import signal
    import subprocess

    _raise_descriptor_limit()
    _adopt_orphans()
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    ending: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: ending.append(received))
    signal.signal(signal.SIGCHLD, lambda _received, _frame: None)
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True).pid
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error}\n")
        return 127
    status: int | None = None
    abandoned = False
    while status is None and not ending:
        readable, _, _ = select.select([0, awake], [], [])
        if awake in readable:
            os.read(awake, 512)
            status = _reap(os.WNOHANG).get(server)
        if 0 in readable:
            abandoned = not os.read(0, 512)
            break
    _kill(os.killpg, server)
    while True:
        for child in _children():
            _kill(os.kill, child)
        ended = _reap(0)
        if not ended:
            break
        status = ended.get(server, status)
    if abandoned:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
    return 1 if status is None else status if status >= 0 else 128 - status


def _reap(flags: int) -> dict[int, int]:
    """Collect children that have ended and return their exit statuses by process id.

    Args:
        flags: WNOHANG takes what is there, which may be nothing; 0 waits for one child, and the
            answer is empty when there is none.
    """
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, flags)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)
        flags = os.WNOHANG


def _kill(kill: object, pid: int) -> None:
    import signal

    assert callable(kill)
    try:
        kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
        pass


def _children() -> list[int]:
    """Return the process ids of our children where the system tells, else nothing."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as listing:
            return [int(pid) for pid in listing.read().split()]
    except OSError:
        return []


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends (Linux only)."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    except (ImportError, OSError, AttributeError):
        pass


def _raise_descriptor_limit() -> None:
    """Give the server as many descriptors as it may have: one connection takes one."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ImportError, OSError, ValueError):  # refused for an unlimited hard limit on macOS
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
