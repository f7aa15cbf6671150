"""From hidden states to a mean opinion score.

`load(DIR)` reads a predictor's folder and gives a `Predictor`. Importing this package loads nothing heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3agiqa.predictor.store import Predictor, load

__all__ = ["Predictor", "load"]


def __getattr__(name: str) -> Any:
    """Loads torch only when a predictor is asked for."""
    if name in __all__:
        from m3agiqa.predictor import store

        return getattr(store, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
