"""Every text file that a user hands in is read with a byte order mark and in UTF-16, as editors of Windows write them."""

import pytest

from spar_hf.data.benchmarks import BENCHMARKS
from spar_hf.data.segmentation_sets import read_classes, read_merged_classes
from spar_hf.data.sources import list_files
from spar_hf.distillation.recipes import read_recipe
from spar_hf.evaluation.dataset import read_words
from spar_hf.pretraining.options import read_recipe as read_sets
from spar_hf.utils.errors import UsageError
from spar_hf.utils.labels import read_labels


def voc_names(path):
    benchmark = BENCHMARKS["voc21"]
    listing = path.parent / benchmark.listing
    listing.parent.mkdir(parents=True)
    path.rename(listing)
    return benchmark.list_names(path.parent, benchmark.images[0])


READERS = {
    "classes.txt": ("Straße\nroad\n", read_classes, ["Straße", "road"]),
    "merged.json": ('{"ground": ["road"]}', lambda path: read_merged_classes(["road"], path), {"ground": ["road"]}),
    "list.txt": (
        "a.png\nb.png\n",
        lambda path: [p.rpartition("/")[2] for p in list_files(str(path))],
        ["a.png", "b.png"],
    ),
    "val.txt": ("2007_000033\n2007_000042\n", voc_names, ["2007_000033", "2007_000042"]),
    "recipe.yaml": ("steps: 5\nimages: [a]\n", read_recipe, {"steps": 5, "images": ["a"]}),
    "words.json": ('{"car": ["automobile"]}', lambda path: read_words(str(path)), {"car": ["automobile"]}),
    "labels.txt": ("Straße\ncar, automobile\n", lambda path: read_labels(f"@{path}").labels, ("Straße", "car")),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_changes_nothing(tmp_path, name, encoding):
    text, read, expected = READERS[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read(tmp_path / name) == expected


@pytest.mark.parametrize("slip", ["steps: 5\nimages: [photos", "steps: 5\nname: a: b", "steps: 5\ndate: 2026-13-45"])
@pytest.mark.parametrize("read", [read_recipe, read_sets])
def test_a_slip_in_yaml_is_a_usage_error_that_names_the_file(read, slip, tmp_path):
    (tmp_path / "recipe.yaml").write_text(slip)
    with pytest.raises(UsageError, match=r"recipe\.yaml.*Write YAML"):
        read(tmp_path / "recipe.yaml")
