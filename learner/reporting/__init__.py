"""What a run shows of itself: files, store, console, trackers, plots, playback, dashboard."""
