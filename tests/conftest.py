"""One profile for hypothesis: the same examples on every run and every machine, and no stop-watch."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("trainfn", deadline=None, derandomize=True)
settings.load_profile("trainfn")
