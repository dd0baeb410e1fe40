"""Images in the tar files of a folder: which tar files are read, and what the results are called."""

import io
import tarfile
from pathlib import Path

import pytest

from spar_hf.utils.folders import Folder
from spar_hf.utils.image_files import find_images


def shards(folder, *names):
    """Tar files with an empty image `a.png` each; finding images opens none."""
    for name in names:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("a.png"))
        parent, _, file = f"{folder}/{name}".rpartition("/")
        Folder(parent).write(file, buffer.getvalue())


def names(*arguments, **options):
    images, problems = find_images(arguments, **options)
    assert not problems
    return [image.name for image in images]


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    return str(tmp_path / "wds") if request.param == "disk" else f"memory://{tmp_path.name}/wds"


def test_tar_files_of_equal_names_keep_their_sub_folders(folder):
    shards(folder, "train/000.tar", "val/000.tar", "val/more.v2.tar")
    assert names(folder) == ["train/000/a", "val/000/a", "val/more.v2/a"]
    assert names(f"{folder}/val") == ["000/a", "more.v2/a"]
    assert names(f"{folder}/val/000.tar") == ["000/a"]
    if "://" not in folder:
        assert names(f"{folder}/*/*.tar") == ["train/000/a", "val/000/a", "val/more.v2/a"]


def test_results_in_tar_files_are_no_inputs_of_the_next_run(folder):
    shards(folder, "000.tar", "masks.tar/part-00000.tar", "masks.tar/.partial-x/part.tar", ".cache/001.tar")
    if "://" in folder:
        assert names(folder, exclude=f"{folder}/masks.tar") == ["000/a"]
        return
    for argument in (folder, f"{folder}/**/*.tar"):
        assert names(argument, exclude=Path(folder, "masks.tar")) == ["000/a"]
