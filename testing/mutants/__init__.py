"""Components with one known fault each, most of which shipped somewhere. A law that does not notice one is no law."""
