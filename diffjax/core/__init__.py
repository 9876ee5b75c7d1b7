"""Array mathematics: no modules, no input or output."""
