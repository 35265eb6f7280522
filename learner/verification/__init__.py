"""Proof on this installation: replay parity, exactness by enumeration, and recorded cases of the official code."""
