"""What moves the weights, and what stops a bad step."""
