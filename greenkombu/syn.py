"""The manual's name for the environment detector; it lives in `hub.environment`."""

from __future__ import annotations

from hub.environment import detect_environment

__all__ = ["detect_environment"]
