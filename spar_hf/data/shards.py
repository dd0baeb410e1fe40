"""Images in WebDataset shards (`.tar`): only images are read, so that nothing else in a shard can stop a run."""

import logging
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_listing import is_image_name

logger = logging.getLogger(__name__)

# words of columns that are no photographs; they are read only if there is nothing else, or if --image_column names them
AUXILIARY = (
    r"(depth|disparity|masks?|seg|segmentation|labels?|annotations?|semantic|instance|normals?|edges?|canny|flow|alpha|"
    r"thumb\w*)"
)


class Member(NamedTuple):
    """An image in a shard: where its bytes are, its key, and its column (`"jpg"`, `"rgb.jpg"`)."""

    shard: str
    offset: int
    size: int
    key: str
    column: str


def is_auxiliary(column: str) -> bool:
    """
    Whether a column is named after something other than photographs.

    Example:

    ```python
    >>> [is_auxiliary(column) for column in ("image", "depth.jpg", "mask", "rgb.jpg", "left_depth.png")]
    [False, True, True, False, True]
    ```"""
    return any(re.fullmatch(AUXILIARY, word) for word in re.split(r"[\W_\d]+", column.lower()))


def choose_columns(columns: Sequence[str], chosen: str | None, label: str) -> list[str]:
    """
    The columns of images that are read, in the order of preference. Several are named in the log.

    Args:
        columns: those of images.
        chosen: `--image_column`: a column, or several as in WebDataset: `"rgb.jpg"`, `".jpg"`, `"jpg;png"`.
        label: of the source, in messages.

    Returns:
        An empty list if there is no such column.

    Example:

    ```python
    >>> choose_columns(["depth.jpg", "rgb.jpg"], None, "shards")
    ['rgb.jpg']
    >>> choose_columns(["depth.jpg", "rgb.jpg"], ".depth.jpg", "shards")
    ['depth.jpg']
    ```"""
    if chosen is not None:
        if chosen in columns:
            return [chosen]
        names = [name.strip().lstrip(".") for name in chosen.split(";")]
        return [name for name in names if name in columns]
    chosen_columns = [column for column in columns if not is_auxiliary(column)] or list(columns)
    # one image stands in several columns only if the columns differ in more than the format
    kinds = {column.rpartition(".")[0] if "." in column else "" for column in columns if is_image_name(f"x.{column}")}
    if len(columns) > 1 and (len(kinds) > 1 or not all(is_image_name(f"x.{column}") for column in columns)):
        others = [column for column in columns if column != chosen_columns[0]]
        logger.warning(
            "%s has several columns of images: %s is read, before %s. Choose another with --image_column.",
            label,
            chosen_columns[0],
            ", ".join(others),
        )
    return chosen_columns


def split_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """
    Key and column of every image name. As in WebDataset, the column starts at the first dot of the file name; but numbers
    (`frame.0000.jpg`) belong to the key, and so do parts with digits that no other key has.

    Example:

    ```python
    >>> split_names(["a/frame.0000.jpg", "a/x.rgb.jpg", "a/x.jpg"])
    [('a/frame.0000', 'jpg'), ('a/x', 'rgb.jpg'), ('a/x', 'jpg')]
    ```"""
    parts = [PurePosixPath(name).name.split(".") for name in names]
    stems = defaultdict(set)  # which keys have a part
    for stem, *middle, _ in parts:
        for part in middle:
            stems[part].add(stem)
    found = []
    for name, (stem, *middle, ending) in zip(names, parts, strict=True):
        column = [ending]
        while middle and not (middle[-1].isdigit() or (re.search(r"\d", middle[-1]) and len(stems[middle[-1]]) == 1)):
            column.insert(0, middle.pop())
        key = ".".join([stem, *middle])
        found.append((str(PurePosixPath(name).with_name(key)), ".".join(column)))
    return found


def list_members(shard: str) -> list[Member]:
    """
    The images of a shard, with the whole name in place of the key.

    Raises:
        UsageError: it is no tar file, or a compressed one.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            entries = [entry for entry in tar if entry.isfile() and is_image_name(entry.name)]
    except tarfile.TarError as error:
        raise UsageError(f"{shard} is no uncompressed tar file ({error}). Copy it again, or unpack it.") from error
    hidden = [PurePosixPath(entry.name).name.startswith(".") for entry in entries]
    return [
        Member(shard, entry.offset_data, entry.size, entry.name, "")
        for entry, skipped in zip(entries, hidden, strict=True)
        if not skipped
    ]


class ShardImages:
    """
    The images of WebDataset shards, by position. Only the headers are read at first.

    Args:
        shards: paths of `.tar` files.
        label: of the source, in messages and names.
        image_column: see [`choose_columns`].

    Raises:
        UsageError: a shard cannot be read, or there is no image or no such column.
    """

    def __init__(self, shards: Sequence[str], label: str, image_column: str | None = None):
        self.label, self.shards = label, list(shards)
        members = [member for shard in shards for member in list_members(shard)]
        split = split_names([member.key for member in members])
        members = [Member(*m[:3], *names) for m, names in zip(members, split, strict=True)]
        counts = Counter(member.column for member in members)
        chosen_columns = choose_columns(list(counts), image_column, label)
        if not chosen_columns:
            raise UsageError(
                f"{label} has no images among its columns {', '.join(counts) or '(none)'}; name one with --image_column."
            )
        best: dict[tuple[str, str], Member] = {}  # one image per key, in the order of the shards
        for member in members:
            if member.column in chosen_columns:
                place = (member.shard, member.key)
                if place not in best or chosen_columns.index(member.column) < chosen_columns.index(best[place].column):
                    best[place] = member
        self.members = list(best.values())
        # images of different shards may have one key, and hold-out sets and records of runs go by names
        in_file = Counter((PurePath(shard).name, key) for shard, key in best)
        keys = Counter(key for _, key in best)
        self.repeated = {key for key, count in keys.items() if count > 1}
        self.ambiguous = {place for place, count in in_file.items() if count > 1}

    def __len__(self) -> int:
        return len(self.members)

    def name(self, i: int) -> str:
        """Label and key, with the file of the shard in between where several shards have the key."""
        shard, key = self.members[i].shard, self.key(i)
        if key not in self.repeated:
            return f"{self.label} {key}"
        file = PurePath(shard).name
        return f"{self.label} {shard if (file, key) in self.ambiguous else file} {key}"

    def key(self, i: int) -> str:
        return self.members[i].key

    def source(self, i: int) -> Any:
        return self.read(self.members[i])

    @staticmethod
    def read(member: Member) -> bytes:
        """The bytes of an image."""
        with Path(member.shard).open("rb") as file:
            file.seek(member.offset)
            return file.read(member.size)

    def rows(self, shards: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Key and image of every sample of some of the shards, as rows of an iterable data set."""
        for shard in shards:
            for member in self.members:
                if member.shard == shard:
                    yield {"__key__": member.key, "image": {"bytes": self.read(member), "path": None}}

    def stream(self) -> Any:
        """An iterable data set of the images, which shuffles shards and splits them among processes."""
        import datasets  # takes a second to import

        features = datasets.Features({"__key__": datasets.Value("string"), "image": datasets.Image(decode=False)})
        options = {"shards": self.shards}
        return datasets.IterableDataset.from_generator(self.rows, features=features, gen_kwargs=options)
