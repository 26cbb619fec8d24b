"""Measurements. `python -m benchmarks …` writes results/*.json, from which the README's tables are made."""
