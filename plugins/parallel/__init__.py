"""Where the work runs, and in which order."""
