"""NVlabs/edm2's statistics of data sets (.pkl), read without running anything that they hold (see `pickles`).

Such a file is a dict of the number of images and, for each metric, mean and covariance of its features:

    read("img512.pkl")      # {"num_images": 1281167, "fid": {"mu": (2048,), "sigma": (2048, 2048)}, "fd_dinov2": {...}}
"""

import os
from typing import Any

from diffjax.weights import array_pickle, pickles
from diffjax.weights.array_pickle import PickledArray
from diffjax.weights.pickles import RefusedError

_EXPECTED = "give a statistics file of NVlabs/edm2, pickled with protocol 3 or 4"


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """num_images: int, where it is there. By metric {"mu": (D,), "sigma": (D, D)}, read-only.

    Raises FileNotFoundError, and ValueError for a file that is damaged, something else, or names a global that is not
    on the list.
    """
    return array_pickle.load(path, _Unpickler, _plain, _EXPECTED)


def _plain(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise RefusedError(f"found a {type(found).__name__}, expected a dict")
    plain = {}
    for name, entry in found.items():
        if name == "num_images" and type(entry) is int:
            plain[name] = entry
        elif isinstance(entry, dict) and all(isinstance(entry.get(key), PickledArray) for key in ("mu", "sigma")):
            plain[pickles.shown(name)] = {key: entry[key].values() for key in ("mu", "sigma")}
        else:
            raise RefusedError(f"found {pickles.shown(name)} without the arrays mu and sigma")
    return plain


class _Unpickler(array_pickle.Unpickler):
    builders = {**array_pickle.Unpickler.builders, ("dnnlib.util", "EasyDict"): pickles.Function(lambda: {})}
