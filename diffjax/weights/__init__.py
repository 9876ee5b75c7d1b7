"""Published weights as plain dicts of arrays."""
