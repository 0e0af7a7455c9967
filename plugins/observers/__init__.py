"""What is seen of a run."""
