"""In which dtype products run."""
