"""Supervised fine-tuning of an adapter on demonstrations; ``python -m learner.sft`` starts it."""
