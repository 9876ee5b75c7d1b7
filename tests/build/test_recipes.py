"""The published recipes of five backbones: every network by its exact number of parameters."""

from pathlib import Path

import jax
import pytest

from diffjax import build
from diffjax.cli import flags
from diffjax.core import trees

CONFIGS = Path(__file__).parents[2] / "configs" / "conditioning"
D, UNET = 1152, 1280  # widths of what metadata joins
CLASSES = 1001 * D
TEXT = 768 * D + D + D * D + D  # CLIP's tokens through two layers
VARIANCE = 16 * D + 16  # of a head with twice as many channels; the recipe has none
CROSS = 4 * D * D + 4 * D + 4 * 72  # attention to the class in a block, with normalised queries and keys in both kinds
# Specification, 2.6: its networks have classes by LayerNorm (DiT, MDT), CLIP's text (the others), and the U-Net sizes too
PLAIN = {
    ("dit", "imagenet"): 674_834_720 - VARIANCE + 28 * CROSS,
    ("mdt", "imagenet"): 742_263_904 - VARIANCE + 29 * CROSS,
    ("pixart", "cc12m"): 607_022_240 - VARIANCE,
    ("mmdit", "cc12m"): 850_745_104,
    ("unet", "cc12m"): 612_114_564 - (2304 * UNET + UNET + UNET * UNET + UNET),
}
PLAIN |= {
    ("dit", "cc12m"): PLAIN["dit", "imagenet"] - CLASSES + TEXT,
    ("mdt", "cc12m"): PLAIN["mdt", "imagenet"] - CLASSES + TEXT,
    ("pixart", "imagenet"): PLAIN["pixart", "cc12m"] + CLASSES - TEXT,
    # one linear layer of tokens and two of the pooled vector, which is as wide as the network for a class
    ("mmdit", "imagenet"): PLAIN["mmdit", "cc12m"] + CLASSES - (768 * D + D) + (D - 768) * D,
    ("unet", "imagenet"): PLAIN["unet", "cc12m"] + 1001 * 768,
}


def control(numbers: int, width: int) -> int:
    """256 k d + d^2 + 2 d of k numbers (specification, 2.6)."""
    return 256 * numbers * width + width * width + 2 * width


@pytest.mark.parametrize("kind, groups", [("baseline", (4,)), ("improved", (3, 2))])
@pytest.mark.parametrize("backbone, data", [pytest.param("dit", "imagenet", marks=pytest.mark.fast), *list(PLAIN)[1:]])
def test_parameters(backbone, data, kind, groups):
    config = flags.load_config(f"{CONFIGS / data}.py:{backbone}_256_{kind}")
    _, init = build.denoiser(config.model, build.data_shape(config.data))
    width = UNET if backbone == "unet" else D
    # and the vector of what is dropped
    expected = PLAIN[backbone, data] + sum(control(numbers, width) for numbers in groups) + width
    assert trees.count(jax.eval_shape(init, jax.random.key(0))) == expected


@pytest.mark.parametrize("data", ["imagenet", "cc12m"])
@pytest.mark.parametrize("arg", ["resnet_256_improved", "mmdit_1024_improved", "mmdit_256", "mmdit_256_best"])
def test_other_variants_are_refused(data, arg):
    with pytest.raises(ValueError, match=rf"found '{arg}', expected one of .* type {data}.py:mmdit_256_improved"):
        flags.load_config(f"{CONFIGS / data}.py:{arg}")
