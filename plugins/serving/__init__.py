"""Serving: continuous batching behind an OpenAI-compatible interface, in one process or in stages of several."""
