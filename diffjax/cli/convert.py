"""Turn a published network into a run folder, to sample from and to distil; and a run into published names.

    python -m diffjax.cli.convert --kind=edm edm-cifar10-32x32-uncond-vp.pkl runs/edm_published
    python -m diffjax.cli.convert --kind=folder sd15 runs/sd15
    python -m diffjax.cli.convert --kind=dit DiT-XL-2-256x256.pt runs/dit --companions=sd15
    python -m diffjax.cli.convert --export=diffusers runs/sd15_tuned unet.safetensors
    python -m diffjax.cli.convert --export=diffjax runs/digits_teacher digits.safetensors

Arguments are the published file and the folder to make, which must not exist; diffjax.cli.sample takes it as its
workdir, and a config of SFD as its method.teacher. With --export they are a run and the file to make.

diffjax: what --export=diffjax writes.

edm: the network pickles of NVlabs/edm (DDPM++, NCSN++ and ADM; EDM, VP and VE preconditioning). A pickle can hold
programs: nothing in it is executed, and a file that asks for it is refused.

folder: a model as diffusers saves it, Stable Diffusion 1, 2, XL and 3, PixArt-alpha, DiT. The run has the denoiser's
weights; text encoder and autoencoder stay where they are, in the folder that its config names (data.companions).

dit, mdt, pixart, sd3: single files of their authors, whose sizes are read from the shapes of the weights. --companions
names a folder whose autoencoder, vae/, makes pictures of their latents, and whose text encoders read the prompts.

sd_v1, sd_v2, sdxl, ldm4g, ldm_bedroom: single files of CompVis and Stability AI. The run has the U-Net's weights, averaged
where the file has averages; --companions as above.

--export=diffusers or original writes the network of a run, averaged where it has averages, as .safetensors with the names
and shapes that diffusers' class or the authors' file of it has. --export=diffjax does so for any run, with our own names,
"enc/conv0/kernel", and its config as JSON in the file's metadata; --kind=diffjax makes a run folder of such a file again.

With --dry_run the file is read and checked, and nothing is written.
"""

import functools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from diffjax.cli import flags
from diffjax.core import names

if TYPE_CHECKING:
    from diffjax.weights import load

POSITIONAL = ("FILE", "FOLDER")
_OWN = "diffjax"
_UNFINISHED = ".unfinished"  # end of the folder's name while it is written


def define(values: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of this command."""
    absl_flags.DEFINE_string("kind", None, f"what the file is: {', '.join(KINDS)}", flag_values=values)
    absl_flags.DEFINE_string("export", None, "write a run's weights by names of: diffusers, original, diffjax", flag_values=values)
    absl_flags.DEFINE_string("companions", None, "single files: folder of the autoencoder and text encoder", flag_values=values)
    absl_flags.DEFINE_bool("dry_run", False, "check everything, print what would be done, and end", flag_values=values)


def main(values: absl_flags.FlagValues, file: str, folder: str) -> None:
    """Read the file, check it against our network, and write the folder; or the other way round."""
    if values.export is not None:
        _export(values, Path(file), Path(folder))
        return
    convert = names.lookup(KINDS, flags.needed(values, "kind", "edm"), "--kind")
    _check_new(Path(folder))
    config, params = convert(Path(file), values.companions)
    _describe(file, config, params)
    if values.dry_run:
        print(f"{folder} was not written: leave --dry_run out to write it")
        return
    write(Path(folder), config, params)
    print(f"wrote {folder}; sample with: python -m diffjax.cli.sample --workdir={folder} --out={folder}/samples")


def _export(values: absl_flags.FlagValues, workdir: Path, file: Path) -> None:
    from diffjax import build
    from diffjax.weights import load

    if given := [f"--{name}" for name in ("kind", "companions") if values[name].value is not None]:
        raise ValueError(f"--export takes a run, found {', '.join(given)}: leave it out")
    if file.suffix != ".safetensors":
        raise ValueError(f"found {file}, expected a name that ends with .safetensors")
    if file.exists():
        raise FileExistsError(f"{file} exists and is not overwritten: choose another name, or remove it")
    if values.export == _OWN:
        weights, metadata, step = _own_names(workdir)
    else:
        run = build.load_run(workdir)
        weights, metadata, step = build.write_weights(run, values.export), {}, run.step
    numbers = sum(array.size for array in weights.values())
    print(f"{workdir}, step {step:,}: {len(weights)} arrays of {numbers:,} numbers")
    if values.dry_run:
        print(f"{file} was not written: leave --dry_run out to write it")
        return
    load.save(file, weights, metadata)
    print(f"wrote {file}")


def _own_names(workdir: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """(path -> array, metadata, step) of the weights to sample with, of a run of any kind."""
    from ml_collections import ConfigDict

    from diffjax import build
    from diffjax.core import trees
    from diffjax.runtime import checkpoint_read

    params, saved, step = checkpoint_read.load_params(workdir, ema=None)
    config = build.resolve(ConfigDict(saved)).to_dict()
    config.get("train", {}).pop("checkpoint_folder", None)  # another run's checkpoints do not belong there
    return trees.flatten(params), {"config": json.dumps(config), "step": str(step)}, step


def _own(file: Path, companions: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    import numpy as np

    from diffjax.core import trees
    from diffjax.weights import load

    _no_companions(companions)
    config = load.metadata(file).get("config")
    if config is None:
        raise ValueError(f"{file} says no config in its metadata: expected a file written with --export={_OWN}")
    return json.loads(config), trees.nest({path: np.asarray(array) for path, array in load.read(file).items()})


def _check_new(folder: Path) -> None:
    for path in (folder, _unfinished(folder)):
        if path.exists() or path.is_symlink():
            why = "another conversion, running or interrupted" if path.name.endswith(_UNFINISHED) else "not overwritten"
            raise FileExistsError(f"{path} exists ({why}): choose another folder, or remove it")
    above = next(path for path in folder.absolute().parents if path.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{folder}: {above} is a file, expected a folder or a new name")


def _describe(file: str, config: dict[str, Any], params: dict[str, Any]) -> None:
    from diffjax import build
    from diffjax.core import trees

    model, sample, shape = config["model"], config["sample"], build.data_shape(config["data"])
    classes = f"{shape.num_classes} classes" if shape.num_classes else "no classes"
    print(f"{file}: {model['name']} ({model['precondition']}), {trees.count(params):,} weights")
    print(f"images of {shape.shape}, {classes}")
    print(
        f"samples with {sample['solver']}, {sample['num_steps']} noise levels from {sample['sigma_max']} to "
        f"{sample['sigma_min']}: {build.plan(sample).nfe} network calls"
    )


def _edm(file: Path, companions: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    import jax

    from diffjax import build
    from diffjax.weights import edm_pickle

    _no_companions(companions)
    network = edm_pickle.read(file)
    config = edm_pickle.sections(network)
    _, init = build.denoiser(config["model"], build.data_shape(config["data"]))
    return config, edm_pickle.to_params(network, jax.eval_shape(init, jax.random.key(0)))


def _folder(folder: Path, companions: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    from diffjax import build

    _no_companions(companions)
    run = build.load_model(folder)
    return run.config.to_dict(), run.params


def _authors(kind: str, file: Path, companions: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    from diffjax.weights import authors, load, unet

    weights = load.read(file)
    if any(name.startswith(unet.PREFIX) for name in weights):  # beside companions in the same file
        weights = load.under(weights, unet.PREFIX)
    return _latent(authors.describe(kind, weights), weights, companions)


def _unet(preset: str, file: Path, companions: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    from diffjax.models import unet as networks
    from diffjax.weights import folders, load, unet

    weights = load.read(file)
    if any(name.startswith("model_ema.") for name in weights):
        weights = unet.averaged(weights)
    options = dict(networks.PRESETS[preset])
    data = {"image_size": options.pop("image_size"), "channels": options.pop("channels"), "num_classes": options.pop("num_classes", 0)}
    options.pop("out_channels")
    process = "ldm" if preset.startswith("ldm") else "scaled_linear"
    model = {"name": "unet", "precondition": "eps", "process": process, **options}
    sections = {"model": model, "data": {"name": "none", **data}, "method": {"name": "edm"}}
    return _latent({**sections, "sample": folders.sample_section(process)}, weights, companions)


def _latent(
    sections: dict[str, Any], weights: "load.Weights", companions: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    import jax

    from diffjax import build

    if companions:
        sections["data"]["companions"] = companions
    shape = build.data_shape(sections["data"])
    expected = jax.eval_shape(build.denoiser(sections["model"], shape)[1], jax.random.key(0))
    return {"seed": 0, **sections}, build.read_weights(sections["model"], shape, weights, expected)


def _no_companions(companions: str | None) -> None:
    if companions:
        raise ValueError("--companions is for networks on latents in a single file: leave it out")


def write(folder: Path, config: dict[str, Any], params: dict[str, Any]) -> None:
    """Make the run folder of a network with `config`, whole or not at all. Raises FileExistsError where it exists,
    checkpoint.CheckpointError where the disk does not take it."""
    from diffjax.runtime import checkpoint, configs

    _check_new(folder)
    unfinished = _unfinished(folder)
    unfinished.mkdir(parents=True)
    try:
        with checkpoint.Checkpoints(unfinished, config) as checkpoints:
            checkpoints.save(0, {"ema_params": params}, None, {})
        configs.write(unfinished, config)
        unfinished.rename(folder)
    except BaseException:  # an interrupt too
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _unfinished(folder: Path) -> Path:
    return folder.with_name(folder.name + _UNFINISHED)


_UNETS = ("sd_v1", "sd_v2", "sdxl", "ldm4g", "ldm_bedroom")
KINDS = {
    "edm": _edm, "folder": _folder, _OWN: _own,
    **{kind: functools.partial(_authors, kind) for kind in ("dit", "mdt", "pixart", "sd3")},
    **{kind: functools.partial(_unet, kind) for kind in _UNETS},
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(flags.run(__doc__, define, main, positional=POSITIONAL))
