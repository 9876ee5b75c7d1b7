"""Videos as files: uint8 (T, H, W, C) to .mp4 and .gif, and back.

    videos.save("fox.mp4", frames, fps=7)      # H.264, which needs the package av; lossy
    videos.save("fox.gif", frames, fps=7)      # 256 colours a frame, by Pillow
    frames = videos.read("fox.mp4")            # uint8 (T, H, W, 3)
    for frame in videos.frames_of("fox.mp4"):  # one at a time
"""

import fractions
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import PIL.Image

_COLOURS = 256  # of a frame of a .gif
_QUALITY = "18"  # constant rate factor of H.264: 0 loses nothing, 23 is its default


def save(path: str | os.PathLike[str], frames: np.ndarray, fps: float) -> None:
    """Write frames, uint8 (T, H, W, C) with C 1 or 3, as .mp4 or .gif; the file appears whole or not at all.

    .mp4 has even sizes: an odd height or width gets a copy of its last row or column. .gif counts time in hundredths of
    a second. Raises ValueError for another suffix, dtype or shape, or an fps that is not positive; ImportError where
    .mp4 is asked for without the package av.
    """
    path, frames = Path(path), _checked(frames)
    if not 0 < fps <= 100:
        raise ValueError(f"found fps={fps}, expected pictures a second, above 0 and up to 100")
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"found {path.name!r}, expected a name that ends in {' or '.join(_WRITERS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _WRITERS[path.suffix.lower()](temporary, frames, fps)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> np.ndarray:
    """All of `frames_of`, uint8 (T, H, W, 3)."""
    return np.stack(list(frames_of(path)))


def frames_of(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """The frames of a video file one after the other, uint8 (H, W, 3). Raises FileNotFoundError, ValueError for a file
    without frames, ImportError where the package av is needed and absent (for all but .gif)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is absent: give the path of a video file")
    number = 0
    for frame in (_of_gif if path.suffix.lower() == ".gif" else _by_av)(path):
        number += 1
        yield frame
    if not number:
        raise ValueError(f"{path} holds no frame: give a video file")


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    av = _av(path)
    frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], mode="edge")
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=fractions.Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"crf": _QUALITY}
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    first, *rest = map(_with_palette, frames)
    duration = max(round(100 / fps), 1) * 10  # milliseconds
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0, optimize=False)


_Writer = Callable[[Path, np.ndarray, float], None]
_WRITERS: Mapping[str, _Writer] = MappingProxyType({".mp4": _write_mp4, ".gif": _write_gif})


def _with_palette(frame: np.ndarray) -> PIL.Image.Image:
    """As indices of colours: all that it has, or those that Pillow chooses where they are more than 256."""
    packed = frame.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, index = np.unique(packed, return_inverse=True)
    if len(colours) > _COLOURS:
        return PIL.Image.fromarray(frame).quantize(_COLOURS)
    picture = PIL.Image.fromarray(index.reshape(packed.shape).astype(np.uint8))
    picture.putpalette(np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(np.uint8).tobytes())
    return picture


def _of_gif(path: Path) -> Iterator[np.ndarray]:
    """A frame that is equal to the one before is written as a longer duration."""
    found, durations = [], []
    try:
        with PIL.Image.open(path) as file:
            for number in range(getattr(file, "n_frames", 1)):
                file.seek(number)
                found.append(np.asarray(file.convert("RGB")))
                durations.append(int(file.info.get("duration", 0)))
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path} is no readable .gif ({error}): give a video file") from error
    unit = math.gcd(*durations) or 1
    for frame, duration in zip(found, durations, strict=True):
        yield from [frame] * max(duration // unit, 1)


def _by_av(path: Path) -> Iterator[np.ndarray]:
    av = _av(path)
    try:
        with av.open(str(path)) as file:
            for frame in file.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, IndexError) as error:  # IndexError: no stream of pictures
        raise ValueError(f"{path} is no readable video ({error}): give a video file") from error


def _av(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path} needs the package av: pip install 'diffjax[video]'; .gif works without") from error
    return av


def _checked(frames: np.ndarray) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] not in (1, 3) or 0 in frames.shape:
        raise ValueError(
            f"found {frames.dtype}{list(frames.shape)}, expected uint8 (T, H, W, 1 or 3) with T > 0: map [-1, 1] to "
            "0..255 first"
        )
    return np.broadcast_to(frames, (*frames.shape[:3], 3))
