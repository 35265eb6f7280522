"""What people watch: the run store (and, later, the dashboard)."""
