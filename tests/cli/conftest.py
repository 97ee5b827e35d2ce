"""The terminal is tried on the same toy stages as the runner."""

from tests.core.conftest import toy

__all__ = ["toy"]
