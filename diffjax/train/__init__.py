"""Training: state, optimiser chains, moving averages, the pure step and the host loop."""
