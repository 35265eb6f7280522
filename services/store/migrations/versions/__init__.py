"""The schema's versions, one migration each."""
