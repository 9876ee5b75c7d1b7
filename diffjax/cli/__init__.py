"""Commands: train, sample, evaluate and inspect, each run as `python -m diffjax.cli.NAME`."""
