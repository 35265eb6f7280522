"""What a run needs around its loop: its folder, checkpoints, Ray, and a way to stop."""
