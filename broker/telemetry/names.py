"""Model names as values of a metric's attribute: a bounded number of them, none of which a page can make up."""

from __future__ import annotations

MOST = 500
"""Models that are named; the rest is `OTHER`."""

OTHER = "other"


class ModelNames:
    """The models that have answered so far."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def name(self, model: str, *, answered: bool) -> str:
        """Return the name for a metric: that of the model if it has answered, now or before, else `OTHER`."""
        if model in self._names:
            return model
        if not answered or len(self._names) >= MOST:
            return OTHER
        self._names.add(model)
        return model
