"""Where images come from, in which order, and what is done to them on the way."""
