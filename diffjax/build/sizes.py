"""What a published model costs, block by block, from its config files alone: no weights are opened, nothing computed.

    for part in model_parts("sd15"):                      # the denoiser, its text encoders, its autoencoder
        print(part.name, sum(block.parameters for block in part.blocks))

Operations are those of matrix products and convolutions, 2 for a multiplication and its addition, found in the
traced program; a loop's body counts as often as it runs, and a kernel at the border of an image as one inside. Each
product belongs to the block whose weights it multiplies, one of no weights (attention's) to the block of the product
before it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from diffjax.build import networks
from diffjax.core import names
from diffjax.core.types import Params
from diffjax.data import sources
from diffjax.models import t5, text, vae
from diffjax.nn import functional
from diffjax.weights import folders, load
from diffjax.weights import text as text_tables

# of the texts that a denoiser is given: CLIP's; T5's of PixArt; CLIP's and T5's of Stable Diffusion 3
_TEXT_TOKENS = {"unet": 77, "pixart": 120, "mmdit": 154}
_COMPUTED_AGAIN = ("checkpoint", "remat2")  # what JAX has called jax.checkpoint in programs


class Block(NamedTuple):
    """A part of a network. repeats: equal blocks in it, run one after the other. flops: of one image or text.
    result_bytes: of what its products and convolutions give, which a gradient keeps, also with remat="dots"; without
    attention's scores where these are computed again."""

    name: str
    repeats: int
    parameters: int
    flops: float
    result_bytes: float


class Part(NamedTuple):
    """One network of a model. source: its folder; inputs: what its operations are counted for."""

    name: str
    source: str
    inputs: str
    blocks: tuple[Block, ...]


def model_parts(folder: str | Path) -> list[Part]:
    """The networks of a model as diffusers saves it. Raises FileNotFoundError for configs that are absent, ValueError
    for networks and options that diffjax does not have."""
    folder = Path(folder)
    sections = folders.describe(folder)
    model, data = sections["model"], networks.data_shape(sections["data"])
    parts = [denoiser_part(model, data, folders.denoiser_part(folder))]
    for source in sorted(path.name for path in folder.glob("text_encoder*") if path.is_dir()):
        parts.append(_text_encoder(folder, source, model["name"]))
    if (folder / (source := folders.autoencoder_part(folder))).is_dir():
        parts.append(_autoencoder(folder / source, data))
    return parts


def total(part: Part) -> Block:
    """Its blocks together."""
    return Block("all", 1, *(sum(column) for column in list(zip(*part.blocks, strict=True))[2:]))


def denoiser_part(model: Mapping[str, Any], data: sources.DataShape, source: str = "") -> Part:
    """The network of a `model` section on one image. Raises ValueError as `networks.denoiser`."""
    denoise, init = networks.denoiser(model, data)
    x, sigma = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, *data.shape), (1,)))
    cond = conditions(model, data)
    blocks = blocks_of(denoise, jax.eval_shape(init, jax.random.key(0)), x, sigma, cond)
    given = f" and a text of {cond['text'].shape[1]} tokens" if "text" in cond else ""
    return Part(model["name"], source, f"an image of {_times(data.shape)}{given}", blocks)


def conditions(model: Mapping[str, Any], data: sources.DataShape, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what the network of a `model` section is told beside the noise level; texts are as long as published
    models have them."""
    options = networks.defaults(model["name"]) | dict(model)
    width = options.get("context_width", 0) if model["name"] == "unet" else options.get("text_width", 0)
    shapes: dict[str, tuple] = {}
    if data.num_classes:
        shapes["label"] = (jnp.int32,)
    elif width:
        shapes["text"] = (jnp.float32, options.get("text_length") or _TEXT_TOKENS.get(model["name"], 77), width)
    if options.get("pooled_width") and not (data.num_classes and model["name"] == "mmdit"):
        shapes["pooled"] = (jnp.float32, options["pooled_width"])
    if options.get("controls"):
        shapes["control"] = (jnp.float32, options["controls"])
    return {name: jax.ShapeDtypeStruct((batch, *shape), dtype) for name, (dtype, *shape) in shapes.items()}


def blocks_of(function: Callable, params: Params, *args: Any) -> tuple[Block, ...]:
    """The blocks of function(params, *args): all under one first name in `params`, or one number where it is a list;
    in the order of their first products, then those without. params and args: trees of shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    owners = [_block_name(path) for path, _ in leaves]
    tally = _Tally()
    program = jax.make_jaxpr(function)(params, *args).jaxpr
    tally.walk(program, [*owners, *[None] * (len(program.invars) - len(owners))])
    counts: defaultdict[str, int] = defaultdict(int)
    for owner, (_, leaf) in zip(owners, leaves, strict=True):
        counts[owner] += math.prod(leaf.shape)
    ordered = sorted(counts, key=lambda name: [*tally.repeats, name].index(name))
    return tuple(
        Block(name, tally.repeats.get(name, 1), counts[name], tally.flops[name], tally.result_bytes[name])
        for name in ordered
    )


def product_flops(program: Any) -> float:
    """Operations of all products and convolutions of a traced program (`jax.jit(f).trace(...).jaxpr`) on all devices: loops
    as often as they run, or at most run (see `core.loops`), those that do not say it once; of branches the one with the
    most."""
    tally = _Tally(most=True)
    tally.walk(program.jaxpr, [None] * len(program.jaxpr.invars))
    return sum(tally.flops.values())


class _Tally:
    """Sums over the products of a program, by the block that owns their weights. repeats: how often a product of
    weights of the block runs, of all that it has the least. most: of branches the one with the most operations counts."""

    def __init__(self, most: bool = False) -> None:
        self.most = most
        self.flops: defaultdict[str, float] = defaultdict(float)
        self.result_bytes: defaultdict[str, float] = defaultdict(float)
        self.repeats: dict[str, int] = {}
        self.last = ""

    def walk(self, program: Any, owners: list[str | None], times: int = 1, kept: bool = True) -> None:
        """owners: of the program's inputs, None for what is no weight. times: how often it runs. kept: whether a
        gradient keeps its results."""
        owner = dict(zip(program.invars, owners, strict=True))
        for equation in program.eqns:
            inputs = [None if isinstance(v, jex.Literal) else owner.get(v) for v in equation.invars]
            if flops := _product_flops(equation):
                self._add([name for name in inputs if name is not None], equation, times * flops, times, kept)
            elif self.most and equation.primitive.name == "cond":
                self.last = ""
                self.flops[self.last] += times * max(map(product_flops, equation.params["branches"]))
            elif bodies := _bodies(equation):
                runs = times * _turns(equation)
                keeps = kept and equation.primitive.name not in _COMPUTED_AGAIN
                for body in bodies:
                    # those of `while` and `cond` have inputs of their own
                    same = len(body.invars) == len(inputs)
                    self.walk(body, inputs if same else [None] * len(body.invars), runs, keeps)
            elif (found := _one_owner(equation, inputs)) is not None:
                owner.update(dict.fromkeys(equation.outvars, found))

    def _add(self, found: list[str], equation: Any, flops: float, times: int, kept: bool) -> None:
        self.last = found[-1] if found else self.last
        self.flops[self.last] += flops
        if kept:
            self.result_bytes[self.last] += times * sum(v.aval.size * v.aval.dtype.itemsize for v in equation.outvars)
        for name in found:
            self.repeats[name] = min(times, self.repeats.get(name, times))


def _turns(equation: Any) -> int:
    """How often the bodies of an equation run; of a `while` the number that its condition compares with, of a
    `shard_map` on all devices among which it shares its work."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":
        return math.prod(equation.params["mesh"].shape[axis] for axis in equation.params["newly_manual_axes"])
    if equation.primitive.name != "while":
        return 1
    compared = [e for e in equation.params["cond_jaxpr"].jaxpr.eqns if e.primitive.name == "lt"]
    numbers = [v.val for e in compared for v in e.invars if isinstance(v, jex.Literal)]
    return int(numbers[0]) if len(numbers) == 1 else 1


def _one_owner(equation: Any, inputs: list[str | None]) -> str | None:
    """Whose weights an equation brings into another shape or type, None where it does anything else."""
    owners = {name for v, name in zip(equation.invars, inputs, strict=True) if not isinstance(v, jex.Literal)}
    return owners.pop() if len(owners) == 1 else None


def _product_flops(equation: Any) -> float:
    """Operations of a matrix product or convolution, 0 for anything else."""
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    if equation.primitive.name == "conv_general_dilated":
        kernel, axes = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
        zeros = math.prod(equation.params["lhs_dilation"])  # put between the inputs: of strides, in gradients
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel[axis] for axis in axes[1:]) / zeros
    return 0.0


def _bodies(equation: Any) -> list[Any]:
    """The programs inside an equation: of a loop, a function, a block that is computed again."""
    programs = jex.Jaxpr | jex.ClosedJaxpr
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: isinstance(v, programs))
    closed = [v.jaxpr if isinstance(v, jex.ClosedJaxpr) else v for v in values]
    return [v for v in closed if isinstance(v, jex.Jaxpr)]


def _block_name(path: tuple) -> str:
    keys = [getattr(entry, "key", getattr(entry, "idx", None)) for entry in path]
    return f"{keys[0]}/{keys[1]}" if len(keys) > 1 and isinstance(keys[1], int) else str(keys[0])


def _clip(config: Mapping[str, Any]) -> tuple[str, Callable, int]:
    options = text_tables.clip_text_options(config)
    return "CLIP's text encoder", lambda rngs: text.ClipText(**options, rngs=rngs), options["length"]


def _t5(config: Mapping[str, Any]) -> tuple[str, Callable, int]:
    options = text_tables.t5_options(config)
    return "T5's encoder", lambda rngs: t5.T5(**options, rngs=rngs), 0


# model_type of config.json -> (name, constructor, tokens of a text or 0 for any number)
_TEXTS: dict[str, Callable[[Mapping[str, Any]], tuple[str, Callable, int]]] = {"clip_text_model": _clip, "t5": _t5}


def _text_encoder(folder: Path, source: str, denoiser: str) -> Part:
    config = load.config(folder / source)
    kind = names.lookup(_TEXTS, config.get("model_type"), f"model_type of {folder / source / 'config.json'}")
    name, make, tokens = kind(config)
    tokens = tokens or (120 if denoiser == "pixart" else 77)
    network, init = functional.functionalize(make)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    blocks = blocks_of(network, jax.eval_shape(init, jax.random.key(0)), ids)
    return Part(name, source, f"a text of {tokens} tokens", blocks)


def _autoencoder(folder: Path, data: sources.DataShape) -> Part:
    kind, options = folders.autoencoder(load.config(folder))
    make = lambda rngs: getattr(vae, kind)(**options, rngs=rngs)  # noqa: E731
    encode, decode = (functional.functionalize(make, method)[0] for method in ("encode", "decode"))
    side = data.image_size * 2 ** (len(options["channel_mult"]) - 1)
    image, latents = (1, side, side, options["channels"]), (1, *data.shape)

    def both(params: Params, image: Any, latents: Any) -> tuple[Any, Any]:
        keys = () if kind == "VQModel" else (jax.random.key(0),)
        return encode(params, image, *keys), decode(params, latents)

    given = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (image, latents))
    blocks = blocks_of(both, functional.abstract(make), *given)
    return Part("autoencoder", folder.name, f"an image of {_times(image[1:])}, encoded and decoded", blocks)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)
