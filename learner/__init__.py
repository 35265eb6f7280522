"""The policy that learns: objectives, the DeepSpeed ranks, the controller."""

import os

import rollout  # noqa: F401  (what it sets for the process holds for ours too)

# How long OpenMP's threads spin at a barrier before they sleep. libgomp's default costs a step of the base's training
# on two busy cores several times its work (1.2 s against 0.2 s), no spinning at all costs it half its speed on two free
# ones (0.13 s against 0.085 s); a thousand turns do neither. Read once, when torch loads libgomp.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
