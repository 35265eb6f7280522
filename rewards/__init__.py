"""Tasks and graders. Imports nothing of ours and no torch."""
