"""Data sets that tensorflow-datasets has prepared, read without TensorFlow."""

from collections.abc import Sequence
from typing import Any

from diffjax.data import checks


def open_split(dataset: str, split: str, data_dir: str, download: bool, num_classes: int) -> tuple[Sequence, str]:
    """(records {"image", "label", ...}, what they are, for messages).

    Raises ImportError without the package, FileNotFoundError for what is not prepared, ValueError for unknown names, a
    format without random access, features that are missing, and another number of classes.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(f"{dataset!r} needs tensorflow-datasets; type: pip install tensorflow-datasets") from error
    where = data_dir or "the default folder of tensorflow-datasets"
    try:
        builder = tensorflow_datasets.builder(dataset, data_dir=data_dir or None)
    except tensorflow_datasets.core.registered.DatasetNotFoundError as error:
        near = checks.nearest(dataset, tensorflow_datasets.list_builders(with_community_datasets=False))
        raise ValueError(f"data.dataset: tensorflow-datasets has no {dataset!r}{near}") from error
    if not builder.is_prepared() and not download:
        raise FileNotFoundError(
            f"{dataset!r} is not prepared in {where}: set data.data_dir to the folder that holds it, or "
            "data.download = True to fetch it"
        )
    if builder.is_prepared():
        _check_features(builder, num_classes, split, f"{dataset!r} in {where}")
    records = tensorflow_datasets.data_source(dataset, split=split, data_dir=data_dir or None, download=download)
    return records, f"{dataset!r}, split {split!r}"


def _check_features(builder: Any, num_classes: int, split: str, what: str) -> None:
    features, file_format = builder.info.features, str(builder.info.file_format.value)
    if file_format not in ("array_record", "parquet"):
        raise ValueError(
            f"{what} is stored as {file_format}, which has no random access: prepare it again with "
            "builder.download_and_prepare(file_format='array_record')"
        )
    missing = [name for name in ("image", "label") if name not in features and (name == "image" or num_classes)]
    if missing:
        raise ValueError(f"{what} has no feature {missing}, found {sorted(features)}")
    classes = getattr(features["label"], "num_classes", None) if "label" in features else None
    if num_classes and classes is not None and classes != num_classes:
        raise ValueError(f"{what} has {classes} classes, found data.num_classes = {num_classes}: set {classes}")
    base = split.partition("[")[0]
    if "+" not in split and base != "all" and base not in builder.info.splits:
        found = list(builder.info.splits)
        near = checks.nearest(base, found)
        raise ValueError(f"data.split: {what} has no split {split!r}, expected one of {found}{near}")
