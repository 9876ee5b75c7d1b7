"""A part of a source that is not trained on.

    training, held_out = split(source, share=0.1)      # the same images whatever the seed of a run
"""

import numpy as np

from diffjax.data import sources


class Part:
    """The items of `source` with these indices, in their order."""

    def __init__(self, source: sources.Source, indices: np.ndarray):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> sources.Item:
        return self._source[int(self._indices[index])]

    def __getitems__(self, indices: list[int]) -> list[sources.Item]:
        """Several at once, as quickly as the source has them."""
        own = [int(self._indices[i]) for i in indices]
        many = getattr(self._source, "__getitems__", None)
        return many(own) if many else [self._source[i] for i in own]


def split(source: sources.Source, share: float) -> tuple[Part, Part]:
    """(training, held out): a fixed random `share` of the items, rounded, is held out, in no relation to their order,
    since many sets are sorted by class or by writer.

    Raises ValueError for a share that leaves one of the parts empty.
    """
    count = round(len(source) * share)
    if not 0 < count < len(source):
        raise ValueError(
            f"a share of {share} of {len(source)} images holds {count} of them out: expected some, and some that are "
            "left; set config.method.held_out = 0.1"
        )
    # RandomState: numpy promises the same numbers in every version
    order = np.random.RandomState(0).permutation(len(source))
    return Part(source, np.sort(order[count:])), Part(source, np.sort(order[:count]))
