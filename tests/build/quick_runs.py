"""Quick configs of digits with a few steps of training, for teachers and students made in seconds."""

from diffjax.cli import flags


def small(name: str, teacher=None, *, batch_size=8, num_steps=2, **changes):
    """configs/quick/NAME for `num_steps` steps; changes: section__key=value."""
    config = flags.load_config(f"configs/quick/{name}")
    config.train.update({"batch_size": batch_size, "total_images": num_steps * batch_size})
    config.train.update({"log_every_steps": 1, "sample_every_steps": 0})
    config.train.num_devices = 1  # eight fake ones share two cores
    config.optim.warmup_images = 0
    if teacher is not None:
        config.method.teacher = str(teacher)
    for key, value in changes.items():
        section, name = key.split("__")
        with config[section].unlocked():
            config[section][name] = value
    return config
