"""Triton operators, one per file. Inert on purpose: Transformers probes for another package of the same name."""

__version__ = "0.1.0"
