"""What people watch: the run store and the dashboard that shows it."""
