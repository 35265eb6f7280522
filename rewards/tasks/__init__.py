"""The tasks that ship, one file each, and where their problems come from."""
