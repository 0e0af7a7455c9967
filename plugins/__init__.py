"""The pieces: one component a file, one room an idea. No room imports another."""
