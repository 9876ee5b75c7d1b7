"""Training methods: a settings dataclass and two pure functions, init and step, each."""
