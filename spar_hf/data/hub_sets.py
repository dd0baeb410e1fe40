"""Opens Hugging Face data sets of images and masks as a [`SegmentationSet`]."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from spar_hf.data.segmentation_sets import IGNORE_INDEX, SegmentationSet, table_of_lines
from spar_hf.utils.errors import UsageError


def load_rows(path: str, split: str | None, subset: str | None) -> Any:
    """
    Load a folder of `save_to_disk` by `load_from_disk`, everything else (parquet folders, hub ids) by `load_dataset`.

    Raises:
        UsageError: a folder of `save_to_disk` holds another split or a subset is asked of it, or `load_dataset` fails.
    """
    folder = Path(path)
    if not (folder / "dataset_dict.json").is_file() and not (folder / "dataset_info.json").is_file():
        try:
            return datasets.load_dataset(path, subset, split=split)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"Cannot load {path}: {reason}. Choose by --subset (now {subset}) and --split (now {split})."
            ) from error
        except Exception as error:  # hub, network and file formats each raise their own kind
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(
                f"--dataset {path} is neither a folder with images/, masks/ and classes.txt nor a data set that can be "
                f"loaded ({reason})."
            ) from error
    if subset is not None:
        raise UsageError(f"{path} is a folder of save_to_disk, which holds one subset only: omit --subset {subset}.")
    loaded = datasets.load_from_disk(path)
    if isinstance(loaded, datasets.Dataset):
        if split is not None and (loaded.split is None or str(loaded.split) != split):
            only = "one split without a name" if loaded.split is None else f"the split {loaded.split} only"
            raise UsageError(f"{path} holds {only}, not {split}: omit --split.")
        return loaded
    return loaded.get(split, loaded)


def open_hugging_face(
    path: str,
    classes: Sequence[str],
    split: str | None = None,
    subset: str | None = None,
    image_column: str = "image",
    mask_column: str = "mask",
    ignore_index: int = IGNORE_INDEX,
    reduce_zero_label: bool = False,
) -> SegmentationSet:
    """
    Open a Hugging Face data set with a column of images and a column of masks.

    Args:
        path: hub id, or local folder of `save_to_disk` or of parquet files.
        classes: the classes in the order of the mask values.
        split: required if there are several.
        subset: configuration; required if a hub id or a folder with a `README.md` has several.
        image_column, mask_column: names of the columns, both of type `datasets.Image`.
        ignore_index: mask value that is ignored, in addition to 255.
        reduce_zero_label: 0 is ignored and value v is class v - 1, as in transformers' image processors.

    Raises:
        UsageError: a split, subset or column must be chosen or does not exist (the message lists those that do), or
            8-bit masks cannot hold `ignore_index`.

    Example:

    ```python
    >>> from PIL import Image
    >>> columns = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    >>> row = {"image": [Image.new("RGB", (8, 8))], "mask": [Image.new("L", (8, 8), 1)]}
    >>> datasets.Dataset.from_dict(row, features=columns).save_to_disk("street")
    >>> data = open_hugging_face("street", classes=["road", "sky"])
    >>> len(data), data.read_mask(0)[0, 0].item()
    (1, 1)
    ```"""
    if not 0 <= ignore_index <= IGNORE_INDEX:
        raise UsageError(
            f"--ignore_index {ignore_index}: masks hold the values 0 to {IGNORE_INDEX}. Set ignored pixels of the masks "
            f"to {IGNORE_INDEX}."
        )
    loaded = load_rows(path, split, subset)
    if not isinstance(loaded, datasets.Dataset):
        if len(loaded) != 1 or split is not None:
            raise UsageError(f"{path} has the splits {', '.join(loaded)}. Choose one with --split.")
        split, loaded = next(iter(loaded.items()))
    elif split is None and loaded.split is not None:
        split = str(loaded.split)
    if image_column == mask_column:
        raise UsageError(f"--image_column and --mask_column are both {image_column!r}; they must name two columns.")
    columns = {name: kind for name, kind in loaded.features.items() if isinstance(kind, datasets.Image)}
    if image_column not in columns or mask_column not in columns:
        raise UsageError(
            f"{path} has no image columns {image_column!r} and {mask_column!r}. Of its columns "
            f"{', '.join(loaded.features)}, these are images: {', '.join(columns) or 'none'}. Name two of them with "
            "--image_column and --mask_column."
        )
    labels, table = table_of_lines(classes)
    if reduce_zero_label:
        table = np.concatenate([[IGNORE_INDEX], table[:255]]).astype(np.int16)
    table[[ignore_index, IGNORE_INDEX]] = IGNORE_INDEX
    rows = loaded.select_columns([image_column, mask_column])
    rows = rows.rename_columns({image_column: "image", mask_column: "mask"})
    names = tuple(f"row{i}" for i in range(len(rows)))
    name = Path(path).resolve().name if Path(path).is_dir() else path
    return SegmentationSet(name, rows, names, labels, table, name, split, subset)
