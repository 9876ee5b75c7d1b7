"""The section `train` of a config."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

from diffjax.core import names


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section `train` of a config. In images: total_images, rounded up to whole steps.

    0 turns off checkpoint_every_steps, checkpoint_every_minutes, sample_every_steps, keep_every_steps
    and stall_minutes (without a step, the stacks are printed). Of the checkpoints the newest
    keep_checkpoints are temporary, whether steps or minutes brought them; those at multiples of
    keep_every_steps are permanent. checkpoint_folder: where they go, a path or gs://BUCKET/FOLDER, "" =
    WORKDIR/checkpoints. num_devices 0: all. mesh: the axes that they are laid out in, "data:2,fsdp:4", "" = all along
    data, see `runtime.mesh`. microbatches: parts of a batch whose gradients are computed in turn and added
    up in a fixed order (see `core.microbatches`), 0 = the batch at once. writers: "tensorboard", "wandb".
    overfit_one_batch: the first batch for ever. The last state is always saved.
    """

    batch_size: int
    total_images: int
    log_every_steps: int = 100
    checkpoint_every_steps: int = 1000
    checkpoint_every_minutes: float = 10.0
    keep_checkpoints: int = 2
    keep_every_steps: int = 0
    checkpoint_folder: str = ""
    sample_every_steps: int = 0
    stall_minutes: float = 10.0
    max_in_flight: int = 2
    num_devices: int = 0
    mesh: str = ""
    microbatches: int = 0
    writers: Sequence[str] = ()
    overfit_one_batch: bool = False

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> Self:
        """Raises ValueError for an unknown key (with the nearest one) or a value out of range."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in section:
            if key not in known:
                raise ValueError(f"unknown key train.{key}; {names.nearest(key, known)}")
        missing = [name for name in ("batch_size", "total_images") if name not in section]
        if missing:
            raise ValueError(f"the section train lacks {missing}: set --config.train.{missing[0]}=...")
        settings = cls(**section)
        for name in ("batch_size", "total_images", "log_every_steps", "keep_checkpoints"):
            if getattr(settings, name) < 1:
                raise ValueError(f"found train.{name} = {getattr(settings, name)}: use 1 or more")
        for name in known:
            value = getattr(settings, name)
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"found train.{name} = {value}: use 0 or more")
        if settings.microbatches and settings.batch_size % settings.microbatches:
            raise ValueError(
                f"train.batch_size={settings.batch_size} has no {settings.microbatches} equal parts: let "
                "train.microbatches divide it"
            )
        return settings

    @property
    def total_steps(self) -> int:
        """Steps that show at least `total_images` images."""
        return -(-self.total_images // self.batch_size)
