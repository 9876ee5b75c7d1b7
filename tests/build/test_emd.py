"""EMD from its config, on a teacher that was trained for seconds: built, sampled, refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_runs import small

from diffjax import build
from diffjax.build import emd_parts
from diffjax.cli.train import train_and_evaluate
from diffjax.methods import emd
from diffjax.methods.emd_chain import StepSizes
from diffjax.sampling import generate

IDS = range(4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a teacher that has a null class."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    config = small("edm_digits.py", None, model__width=16, model__depth=1, method__label_dropout=0.2)
    train_and_evaluate(config, folder)
    return folder


def student_of(teacher, **changes):
    """The run that EMD would leave, with the teacher's weights."""
    return build.load_run(teacher)._replace(config=build.resolve(small("emd_digits.py:emd_4", teacher, **changes)))


# Sampled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latent", "sigma"), [("sigma", 5.0), ("unit", 3.0)])
def test_a_student_samples_in_one_call_of_its_generator(teacher, latent, sigma):
    student = student_of(teacher, method__latent=latent, method__generator_sigma=sigma)
    plan = build.run_plan(student)
    assert plan.nfe == 1 and build.trained_steps(student.config.method) == (2,)
    drawn = build.draw(student, plan, 3, IDS, batch_size=4)
    ids = jnp.asarray(IDS)
    cond = {"label": generate.draw_labels(3, ids, 10)}
    z = generate.initial_noise(3, ids, student.data.shape)
    one, other = (
        jax.jit(emd.generator(student.denoise, sigma, kind))(student.params, z, cond)
        for kind in (latent, "sigma" if latent == "unit" else "unit")
    )
    np.testing.assert_allclose(drawn, one, rtol=1e-5, atol=1e-5)  # float32, x - sigma (x - D) / sigma at |x| of 15
    assert np.max(np.abs(drawn - other)) > 1e-3


def test_a_student_makes_one_step_only(teacher):
    with pytest.raises(ValueError, match="found num_steps=4, and this generator makes one step"):
        build.run_plan(student_of(teacher), num_steps=4)


# Built -----------------------------------------------------------------------------------------------------------


def test_state_starts_as_the_teacher_and_step_keeps_its_shapes(teacher):
    """Traced with a guided teacher; generator and score are the teacher's weights, in arrays of their own."""
    experiment = build.experiment(small("emd_digits.py:emd_4", teacher, method__guidance_scale=2.0))
    state, known = experiment.init(), build.load_run(teacher).params
    for params in (state.method.params, state.method.score, state.ema_params):
        jax.tree.map(np.testing.assert_array_equal, params, known)
    assert experiment.frozen.step_sizes == pytest.approx((0.16, 1.6e-5), rel=1e-6)  # float32
    stepped, metrics = jax.eval_shape(experiment.step, state, experiment.frozen, {})
    assert jax.tree.map(jnp.shape, stepped) == jax.tree.map(jnp.shape, state)
    assert {"score_loss", "residual", "nonfinite_sample"} <= set(metrics)


# Refused ---------------------------------------------------------------------------------------------------------


def loads(monkeypatch, **changes):
    """Every run that is loaded has these changes."""
    load = build.runs.load_run
    monkeypatch.setattr(build.runs, "load_run", lambda workdir: load(workdir)._replace(**changes))


def test_a_teacher_that_is_a_student_is_refused(teacher, monkeypatch):
    loads(monkeypatch, config=student_of(teacher).config)
    with pytest.raises(ValueError, match="a student of method 'emd': give the run that it was distilled from"):
        build.experiment(small("emd_digits.py:emd_4", teacher))


def test_guidance_needs_a_null_class(teacher, monkeypatch):
    loads(monkeypatch, null_class=False)
    with pytest.raises(ValueError, match="guidance_scale=2.0 needs a null class and this run was trained without one"):
        build.experiment(small("emd_digits.py:emd_4", teacher, method__guidance_scale=2.0))


def test_a_network_that_is_not_the_teachers_is_refused(teacher):
    experiment = build.experiment(small("emd_digits.py:emd_4", teacher, model__width=32))
    with pytest.raises(ValueError, match="as a student of config.model, does not fit"):
        experiment.init()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__image_size": 16}, "the teacher in .* has .*: make them equal"),
        ({"method__scheme": "z"}, r"the scheme must be one of .*, found 'z'"),
        ({"method__langevin_steps": 0}, "without a step the residual and the gradient are zero"),
        ({"method__latent": "vp"}, "latent must be one of .*, found 'vp'"),
        ({"method__cancell": True}, "'cancell'.*'cancel'"),
        ({"method__generator_weighting": "dmd3"}, "'dmd3'"),
        ({"method__noise_step": -0.1}, r"noise_step is a rate and must not be negative, found -0\.1; published: .*0\.16"),
        ({"method__latent_step": float("nan")}, "latent_step is a rate .*found nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(teacher, changes, message):
    with pytest.raises(ValueError, match=message):
        build.experiment(small("emd_digits.py:emd_4", teacher, **changes))


def test_step_sizes_that_are_not_given_are_the_published_ones():
    assert emd_parts.step_sizes({}) == StepSizes(0.4**2, 0.004**2)
    assert emd_parts.step_sizes({"noise_step": 0.1, "latent_step": 0.2}, latent_step=0.0) == StepSizes(0.1, 0.0)
