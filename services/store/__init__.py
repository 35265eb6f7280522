"""The run store: what a run leaves for people to look at. SQLite by default, any SQLAlchemy URL in principle.

Written by ``writer.StoreWriter`` in the training process, read through ``reader``. Imports neither torch nor a web
framework, and of ours only ``rewards.errors``.
"""
