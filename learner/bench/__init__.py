"""Benchmarks: every claim about speed and memory as a ratio measured in one run (docs/benchmarks.md).

``python -m learner.bench`` runs all that don't need a GPU; each module also runs alone.
"""
