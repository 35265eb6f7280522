"""Alembic's environment (``env``) and one file a schema version. A released migration never changes again."""
