"""Kombu's place for the cycle over queues and channels."""

from __future__ import annotations

from greenkombu.utils.scheduling import FairCycle

__all__ = ["FairCycle"]
