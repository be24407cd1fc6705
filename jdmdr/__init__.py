"""jdmdr: multilingual dense retrievers in JAX, trained on better data (DMDR and four related systems)."""

__version__ = "0.1.0"
