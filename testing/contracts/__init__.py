"""What each slot owes: one file a slot, one class of laws a file."""
