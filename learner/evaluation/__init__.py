"""Evaluation of a policy over a grid of decoding settings; ``python -m learner.evaluate`` is the command."""
