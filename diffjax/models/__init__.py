"""Networks: Flax NNX modules that hold parameters and nothing else."""
