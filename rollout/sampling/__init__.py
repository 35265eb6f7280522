"""Denoising: which positions a step reveals, from which law their tokens are drawn, and with which noise."""
