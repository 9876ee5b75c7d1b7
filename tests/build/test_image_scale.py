"""data.image_scale: pixels are multiplied before noise is added, samples divided, and sigma_data follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_runs import small

from diffjax import build
from diffjax.build import networks, parts
from diffjax.cli.train import train_and_evaluate


@pytest.mark.fast
def test_the_batch_is_scaled():
    config = small("immiscible_digits.py:flow_linear", data__image_scale=3.0)
    image = jnp.linspace(-1, 1, 64).reshape(1, 8, 8, 1)
    np.testing.assert_allclose(parts.prepare(config)({"image": image}, jax.random.key(0))["image"], 3 * image, rtol=1e-6)


def test_edm_scales_as_a_whole():
    """With sigma_data scaled alike, D of c x at c sigma is c times D of x at sigma, but for the network's noise label."""
    config = small("edm_digits.py")
    shapes = [build.data_shape({**config.data, "image_scale": scale}) for scale in (1.0, 2.0)]
    (plain, init), (scaled, _) = (build.denoiser(config.model, shape) for shape in shapes)
    params = init(jax.random.key(0))
    params["noise_in"]["kernel"] *= 0  # deaf to the label
    params["image_out"]["kernel"] += 0.1
    x, label = jax.random.normal(jax.random.key(1), (3, 8, 8, 1)), {"label": jnp.arange(3)}
    sigma = jnp.array([0.1, 1.0, 10.0])
    np.testing.assert_allclose(scaled(params, 2 * x, 2 * sigma, label), 2 * plain(params, x, sigma, label), rtol=1e-4, atol=1e-5)


def test_samples_are_divided(tmp_path):
    config = small("immiscible_digits.py:flow_none", data__image_scale=2.0)
    train_and_evaluate(config, tmp_path)
    run = build.load_run(tmp_path)
    plan = build.run_plan(run, num_steps=3)
    found = build.draw(run, plan, 0, range(4), batch_size=4)
    plain = run._replace(data=networks.sources.DataShape(8, 1))
    np.testing.assert_allclose(2 * found, build.draw(plain, plan, 0, range(4), batch_size=4), rtol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="image_scale multiplies the pixels, above 0, found -1"):
        build.experiment(small("edm_digits.py", data__image_scale=-1.0))
    config = small("immiscible_digits.py:ddim_none", data__image_scale=2.0)
    config.model = {"name": "ddpmpp", "precondition": "eps", "learned_variance": True, "channels": 8, "channel_mult": (1,)}
    config.model.update({"num_blocks": 1, "attention_sizes": ()})
    with pytest.raises(ValueError, match=r"learned_variance takes pixels in \[-1, 1\], found data.image_scale=2.0"):
        build.experiment(config)
    config = small("edm_digits.py", data__image_scale=2.0)
    config.method.perceptual = {"network": "vgg", "backbone": "file.pth"}
    with pytest.raises(ValueError, match=r"takes pixels in \[-1, 1\], found data.image_scale=2.0"):
        parts.perceptual(config)
