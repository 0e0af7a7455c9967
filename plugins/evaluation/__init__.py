"""Evaluation beyond held-out text: tasks of lm-evaluation-harness, and facts hidden in long contexts."""
