"""Presets that ship with tangram."""
