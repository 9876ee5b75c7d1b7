"""Models of video in folders as diffusers writes them, and clips from them.

    video = load_video("stable-video-diffusion-img2vid")
    clip = from_picture(video, picture, seeds=[0], size=(576, 1024))              # uint8 (1, 14, 576, 1024, 3)
    video = load_video("sd15", motion="animatediff-motion-adapter-v1-5-2")
    clip = from_text(video, "a red fox in the snow", seeds=[0], size=(512, 512))

A folder of StableVideoDiffusionPipeline or AnimateDiffPipeline; or Stable Diffusion 1 and a motion adapter beside it, a
folder or the authors' file, sampled as AnimateDiff's scripts do. Weights are read when a stage begins, in the type that
it computes in, see `video.pipelines`. Nothing is downloaded.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffjax.build import companions
from diffjax.core import grids, names, prediction, respaced, schedules, solvers
from diffjax.core.types import Params
from diffjax.models import image_encoder, motion_unet, svd, vae, vae_video
from diffjax.nn import functional
from diffjax.nn.groups import PLAIN, Runner
from diffjax.video import grouping, guided, memory, pipelines, rehash, steps
from diffjax.video import offload as waiting
from diffjax.weights import folders, keymap, load
from diffjax.weights import motion as motion_tables
from diffjax.weights import svd as svd_tables
from diffjax.weights import text as text_tables
from diffjax.weights import unet as unet_tables
from diffjax.weights import vae as vae_tables

MOTION_FRAMES = 16  # AnimateDiff's clips
Put = Callable[[np.ndarray], jax.Array]  # to the memory where weights wait
_SCRIPTS = ("animatediff", {"spacing": "linspace", "offset": 0, "to_zero": False})  # the sampler of its authors


class Video(NamedTuple):
    """A model, ready to make clips. weights: see `pipelines.Weights`; plan: of a number of steps; num_frames: of the
    clips it was trained on; max_frames: the most it can make, 0 for any; factor: pixels a latent along a side;
    channels: of latents; shapes: of the weights of "unet" and "vae"; context: (tokens, width) that the U-Net attends
    to; clip_size: of the pictures that the image encoder sees; tokenise: of texts."""

    folder: str
    parts: pipelines.ImageToVideo | pipelines.TextToVideo
    weights: pipelines.Weights
    plan: Callable[[int], solvers.Plan]
    num_frames: int
    max_frames: int
    factor: int
    channels: int
    shapes: Mapping[str, Params]
    context: tuple[int, int]
    clip_size: int = 0
    tokenise: Callable[[Sequence[str]], dict[str, np.ndarray]] | None = None


def load_video(
    folder: str | Path, motion: str | Path = "", compute_dtype: str = "", offload: Sequence[str] = ()
) -> Video:
    """The model in a folder. motion: motion modules for Stable Diffusion; compute_dtype: of the U-Net and the decoder,
    "" for float32. The weights of the U-Net are held in it. What encodes texts and pictures stays in float32. offload:
    of the plan that clips will be made by; with "weights" those of the U-Net and the autoencoder stay on the host.

    Raises FileNotFoundError for parts that are absent, ValueError for another kind of model or an option that we do not
    have, and as `offload.check`.
    """
    folder = Path(folder)
    made = folders.index(folder).get("_class_name")
    kind = names.lookup(_KINDS, made, f"class of video, in {folder / folders.INDEX},")
    if bool(motion) != (kind is _with_adapter):
        raise ValueError(
            f"{folder} has its own motion: leave --motion={motion} out" if motion
            else f"{folder} is Stable Diffusion, which makes no clips by itself: give motion modules with --motion"
        )  # fmt: skip
    waiting.check(offload)
    put = waiting.to_host if "weights" in offload else jnp.asarray
    return kind(folder, motion, jnp.dtype(compute_dtype) if compute_dtype else None, put)


def from_picture(
    video: Video, picture: np.ndarray, seeds: Sequence[int], *, num_steps: int = 25, **options: Any
) -> np.ndarray:
    """Clips uint8 (n, T, H, W, 3) that begin with a picture; options of `tell_picture` and `pipelines.make`."""
    return _clips(tell_picture, video, picture, seeds, num_steps, **options)


def from_text(video: Video, prompt: str, seeds: Sequence[int], *, num_steps: int = 25, **options: Any) -> np.ndarray:
    """Clips uint8 (n, T, H, W, 3) of a text; options of `tell_text` and `pipelines.make`."""
    return _clips(tell_text, video, prompt, seeds, num_steps, **options)


def _clips(
    tell: Callable[..., pipelines.Told], video: Video, given: Any, seeds: Sequence[int], num_steps: int, *,
    sequential: bool = False, schedule: rehash.Schedule | None = None, run: Runner = PLAIN, **options: Any,
) -> np.ndarray:  # fmt: skip
    told = tell(video, given, seeds, **options)
    how = dict(sequential=sequential, schedule=schedule, run=run)
    return pipelines.make(video.parts, video.weights, told, video.plan(num_steps), **how)


def tell_picture(
    video: Video, picture: np.ndarray, seeds: Sequence[int], *, size: tuple[int, int], num_frames: int = 0,
    **options: Any,
) -> pipelines.Told:  # fmt: skip
    """What the network is told of a picture uint8 (h, w, 3), for one clip of each of `seeds`.

    size: (H, W) in pixels, to which the picture is stretched; options: of `pipelines.tell_picture`. Raises ValueError
    for a model of texts, and a size or frames that it does not have.
    """
    if not isinstance(video.parts, pipelines.ImageToVideo):
        raise ValueError(f"{video.folder} makes clips of a text, found a picture: give --prompt in place of --image")
    frames = check(video, size, num_frames)
    small = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.LANCZOS))
    seen = pipelines.for_clip(picture, video.clip_size)
    alike = (np.repeat(array[None], len(seeds), axis=0) for array in (small, seen))
    options |= dict(sample_ids=list(seeds), num_frames=frames)
    return pipelines.tell_picture(video.parts, video.weights, *alike, **options)


def tell_text(
    video: Video, prompt: str, seeds: Sequence[int], *, size: tuple[int, int], negative_prompt: str = "",
    num_frames: int = 0, **options: Any,
) -> pipelines.Told:  # fmt: skip
    """The same of a text; options: of `pipelines.tell_text`. Raises as `tell_picture`."""
    if not isinstance(video.parts, pipelines.TextToVideo):
        raise ValueError(f"{video.folder} makes clips of a picture, found a text: give --image in place of --prompt")
    frames = check(video, size, num_frames)
    tokens, negative = (video.tokenise([text] * len(seeds)) for text in (prompt, negative_prompt))
    return pipelines.tell_text(
        video.parts, video.weights, tokens, negative, sample_ids=list(seeds), num_frames=frames,
        size=tuple(length // video.factor for length in size), **options,
    )  # fmt: skip


def fit(video: Video, budget: float, offload: Sequence[str] = (), **options: Any) -> grouping.Plan:
    """Slices with which a step of the U-Net, and the decoder, are predicted to stay within `budget` bytes, weights
    included where they do not wait on the host. options: those of `calls`. Raises ValueError for a budget below what
    the finest slices need, and as `tell_picture`.
    """
    plans = [memory.fit(steps.trace(*call, offload=offload), budget) for call in calls(video, **options)]
    groups = {name: count for plan in plans for name, count in plan.groups.items()}
    return grouping.Plan(groups=groups, offload=offload)


def check_plan(video: Video, plan: grouping.Plan, **options: Any) -> None:
    """Raises ValueError for a plan with groups that the U-Net and decoder do not have; options: those of `calls`."""
    grouping.check(plan, [group for call in calls(video, **options) for group in grouping.groups_of(*call)])


def calls(
    video: Video, *, size: tuple[int, int], count: int = 1, num_frames: int = 0, is_guided: bool = True,
    sequential: bool = False, mode: str = "",
) -> list[tuple]:  # fmt: skip
    """(function(weights, *arrays, run), *shapes of what it takes): a step of the U-Net, and the decoder. count: of
    clips at once; sequential: guidance's halves one after the other; mode: of a `rehash.Schedule`, whose feature is
    kept."""
    frames, (height, width) = check(video, size, num_frames), (length // video.factor for length in size)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    z = shape(count, frames, height, width, video.channels)
    at_once = (2, count) if is_guided else (count,)
    if isinstance(video.parts, pipelines.ImageToVideo):
        latents = shape(*at_once, height, width, video.channels)
        cond = {"image": shape(*at_once, *video.context), "image_latents": latents, "control": shape(*at_once, 3)}
    else:
        cond = {"text": shape(*at_once, *video.context)}

    def step(*arrays: Any, run: Runner = PLAIN) -> Any:
        network = guided.run_by(video.parts.network, run)
        network = guided.guided(network, 1.0, sequential) if is_guided else network
        return network.full(*arrays) if mode in ("", "output") else network.keep(*arrays, anchor=mode)

    unet = step, video.shapes["unet"], z, shape(count), cond
    return [unet, (video.parts.decode, video.shapes["vae"], z)]


def check(video: Video, size: tuple[int, int], num_frames: int = 0) -> int:
    """The number of frames. Raises ValueError for sizes that are no multiple of a latent's, and too many frames."""
    if any(length < video.factor or length % video.factor for length in size):
        nearest = "x".join(str(max(1, round(length / video.factor)) * video.factor) for length in size)
        raise ValueError(f"found clips of {size[0]}x{size[1]}, expected multiples of {video.factor}: take {nearest}")
    if num_frames < 0 or (video.max_frames and num_frames > video.max_frames):
        most = f"1 to {video.max_frames}, the positions of its motion modules" if video.max_frames else "at least 1"
        raise ValueError(f"found {num_frames} frames, expected {most}")
    return num_frames or video.num_frames


# Kinds of models ------------------------------------------------------------------------------------------------


def _svd(folder: Path, _: str, dtype: Any, put: Put) -> Video:
    _, options = folders.video_denoiser(load.config(folder / "unet"))
    kind, decoder = folders.video_autoencoder(load.config(folder / "vae"))
    if kind != "AutoencoderKLTemporalDecoder":
        raise ValueError(f"{folder / 'vae'} is of class {kind}, expected AutoencoderKLTemporalDecoder")
    seeing = text_tables.clip_image_options(load.config(folder / "image_encoder"))
    make_unet = lambda rngs: svd.SVDUNet(**options, dtype=dtype, rngs=rngs)  # noqa: E731
    make_vae = lambda dtype: functools.partial(_video_vae, {**decoder, "dtype": dtype})  # noqa: E731
    make_clip = lambda rngs: image_encoder.ClipImage(**seeing, rngs=rngs)  # noqa: E731
    clip, shapes = functional.functionalize(make_clip)[0], _shapes(make_unet, make_vae(None), dtype)
    parts = pipelines.ImageToVideo(
        see=lambda params, seen: clip(params, image_encoder.normalise(seen)).pooled[:, None],
        encode=functional.functionalize(make_vae(None), "mode")[0],
        network=guided.functions(make_unet),
        precondition=prediction.edm_v_denoiser,
        decode=functional.functionalize(make_vae(dtype), "decode")[0],
    )
    read = {
        "image_encoder": _reader(folder / "image_encoder", functional.abstract(make_clip), text_tables.clip_image),
        "vae": _reader(folder / "vae", shapes["vae"], lambda _: svd_tables.vae(len(decoder["channel_mult"])), put),
        "unet": _reader(folder / "unet", shapes["unet"], lambda _: svd_tables.unet(), put),
    }
    levels = folders.karras_levels(folder / "scheduler")
    plan = lambda num: solvers.make_plan("euler", grids.append_zero(grids.polynomial(num, *levels)))  # noqa: E731
    factor = 2 ** (len(decoder["channel_mult"]) - 1)
    return Video(
        str(folder), parts, lambda part: read[part](), plan, options["num_frames"], 0, factor, options["channels"],
        shapes, (1, options["context_width"]), clip_size=seeing["image_size"],
    )  # fmt: skip


def _video_vae(options: Mapping[str, Any], rngs: Any) -> vae_video.AutoencoderKLTemporalDecoder:
    return vae_video.AutoencoderKLTemporalDecoder(**options, rngs=rngs)


def _animatediff(folder: Path, _: str, dtype: Any, put: Put) -> Video:
    _, options = folders.video_denoiser(load.config(folder / "unet"))
    both = lambda: motion_tables.split(load.read(folder / "unet"))  # noqa: E731
    return _text_to_video(folder, options, both, folders.ddim_options(folder / "scheduler"), dtype, put)


def _with_adapter(folder: Path, motion: str, dtype: Any, put: Put) -> Video:
    name, options, shape = folders.denoiser(load.config(folder / "unet"))
    if name != "unet" or "head_dim" in options or "controls" in options:
        raise ValueError(f"{folder} is no Stable Diffusion 1, the only one that --motion is for")
    modules = load.read(motion)
    sizes = dict(image_size=shape["image_size"], channels=shape["channels"], out_channels=shape["channels"])
    # the authors' files have no config, and 8 heads
    heads = load.config(Path(motion))["motion_num_attention_heads"] if Path(motion).is_dir() else 8
    options = {**options, **sizes, **motion_tables.options(modules), "motion_heads": heads}
    both = lambda: (load.read(folder / "unet"), modules)  # noqa: E731
    return _text_to_video(folder, options, both, _SCRIPTS, dtype, put)


_KINDS = {
    "StableVideoDiffusionPipeline": _svd, "AnimateDiffPipeline": _animatediff, "StableDiffusionPipeline": _with_adapter,
}  # fmt: skip


def _text_to_video(
    folder: Path, options: Mapping[str, Any], both: Callable[[], tuple], sampler: tuple[str, dict], dtype: Any, put: Put
) -> Video:
    """both: weights of the U-Net and of its motion modules."""
    kind, decoder = folders.video_autoencoder(load.config(folder / "vae"))
    make_vae = lambda rngs: getattr(vae, kind)(**decoder, dtype=dtype, rngs=rngs)  # noqa: E731
    make_unet = lambda rngs: motion_unet.MotionUNet(**options, dtype=dtype, rngs=rngs)  # noqa: E731
    text = companions.text_encoder(folder)
    table = schedules.table(sampler[0])
    parts = pipelines.TextToVideo(
        encode=text.encode,
        network=guided.functions(make_unet),
        precondition=functools.partial(prediction.eps_denoiser, schedule=table),
        decode=functools.partial(pipelines.frame_by_frame, functional.functionalize(make_vae, "decode")[0]),
        channels=options["channels"],
    )
    shapes, levels = _shapes(make_unet, make_vae, dtype), len(decoder["channel_mult"])

    def unet_params() -> Params:
        unet, motion = both()
        place = lambda _, array: put(array)  # noqa: E731
        return motion_tables.merge(unet, motion, shapes["unet"], unet_tables.diffusers(), options["max_frames"], place)

    read = {
        "text_encoder": lambda: text.params,
        "vae": _reader(folder / "vae", shapes["vae"], lambda weights: vae_tables.table(weights, levels), put),
        "unet": unet_params,
    }
    plan = functools.partial(respaced.ddim, table, **sampler[1])
    factor = 2 ** (levels - 1)
    frames = min(MOTION_FRAMES, options["max_frames"])
    context = 77, options["context_width"]
    return Video(
        str(folder), parts, lambda part: read[part](), plan, frames, options["max_frames"], factor, options["channels"],
        shapes, context, tokenise=text.tokenise,
    )  # fmt: skip


def _reader(
    folder: Path, expected: Params, table: Callable[[load.Weights], keymap.KeyMap], put: Put = jnp.asarray
) -> Callable[[], Params]:
    """() -> the parameters of a part, where `put` puts them."""
    load.config(folder)  # absent parts are said at once

    def read() -> Params:
        weights = load.read(folder)
        return keymap.to_params(table(weights), weights, expected, weights.source, lambda _, array: put(array))

    return read


def _shapes(make_unet: Callable, make_vae: Callable, dtype: Any) -> dict[str, Params]:
    """Of the weights; those of the U-Net in `dtype`."""
    unet = functional.abstract(make_unet)
    unet = unet if dtype is None else jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), unet)
    return {"unet": unet, "vae": functional.abstract(make_vae)}
