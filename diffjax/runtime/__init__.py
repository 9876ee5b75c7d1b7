"""What a long run needs around its mathematics: checkpoints, logs, clocks, guards, reports."""
