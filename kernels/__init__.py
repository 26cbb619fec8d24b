"""Triton operators, one per file. Inert on purpose: a package of the same name exists, and Transformers probes for it."""

__version__ = "0.1.0"
