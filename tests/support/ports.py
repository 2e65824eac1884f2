"""Ports for the servers of tests."""

from __future__ import annotations

from greenkombu.utils._private_server import free_ports

__all__ = ["free_port", "free_ports"]


def free_port() -> int:
    """Return a port of the loopback interface, below 32768, on which nothing listens now."""
    return free_ports(1)[0]
