"""Pictures: of one run (curves.py), of several side by side (figures.py), on a page (page.py)."""

from ais_jax.report.curves import curves, figure

__all__ = ["curves", "figure"]
