"""Huge images: TIFF files by windows, label maps strip by strip, georeferences, failures that leave nothing behind."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from spar_hf import SparImageProcessorPil
from spar_hf.batch.huge_images import open_windows, segment_huge
from spar_hf.batch.tiff_files import TiffPixels, georeference, tiles_of_strips, write_label_tiff
from spar_hf.model.image_input import read_rgb
from spar_hf.model.image_windows import ImageWindows
from spar_hf.utils.errors import UsageError

tifffile = pytest.importorskip("tifffile")

LABELS = ["road", "car, automobile", "sky"]
TILE = {"size": 48, "overlap": 16}
SMOOTH = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((131, 90))
RGB = np.asarray(SMOOTH)
# a place in Germany in UTM zone 32, half a metre per pixel
GEO = [
    (33550, 12, 3, (0.5, 0.5, 0.0), True),
    (33922, 12, 6, (0.0, 0.0, 0.0, 500000.0, 5400000.0, 0.0), True),
    (34735, 3, 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632), True),
]


@pytest.fixture
def aerial(tmp_path) -> Path:
    path = tmp_path / "aerial.tif"
    options = {"tile": (32, 64), "compression": "zlib", "photometric": "rgb", "metadata": None}
    tifffile.imwrite(path, RGB, extratags=GEO, **options)
    return path


WINDOWS = [(0, 0, 90, 131), (10, 20, 47, 100), (88, 100, 90, 131), (31, 63, 33, 65)]


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"rowsperstrip": 17, "compression": "zlib"},
        {"tile": (64, 32)},
        {"tile": (64, 32), "compression": "zlib", "predictor": 2},
        {"tile": (32, 32), "compression": "zlib", "planarconfig": "separate"},
        {"planarconfig": "separate"},
        {"tile": (32, 32), "compression": "zlib", "byteorder": ">", "bigtiff": True},
        {"tile": (32, 32), "compression": "lzw"},
        {"tile": (32, 32), "compression": "jpeg"},
    ],
    ids=str,
)
def test_windows_of_tiff_files_are_parts_of_the_whole(tmp_path, layout):
    if layout.get("compression") in ("lzw", "jpeg"):
        pytest.importorskip("imagecodecs")
    image = RGB.transpose(2, 0, 1) if "planarconfig" in layout else RGB
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", metadata=None, **layout)
    windows = open_windows(tmp_path / "a.tif")
    whole = tifffile.imread(tmp_path / "a.tif")
    whole = whole.transpose(1, 2, 0) if "planarconfig" in layout else whole
    assert windows.size == (90, 131)
    for top, left, bottom, right in WINDOWS:
        assert np.array_equal(windows.read(top, left, bottom, right), whole[top:bottom, left:right])


@pytest.mark.parametrize("compression", ["raw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "I;16", "F"])
def test_kinds_of_colours_are_those_of_the_one_reader(tmp_path, mode, compression):
    if mode == "I;16":
        image = Image.fromarray(RGB[:, :, 0].astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(RGB[:, :, 0].astype(np.float32) / 255)
    elif mode == "RGBA":
        image = Image.merge("RGBA", [*SMOOTH.split(), SMOOTH.convert("L")])
    else:
        image = SMOOTH.convert(mode)
    image.save(tmp_path / "a.tif", compression=compression)
    expected = np.asarray(read_rgb(tmp_path / "a.tif"))
    for top, left, bottom, right in WINDOWS:
        found = open_windows(tmp_path / "a.tif").read(top, left, bottom, right)
        found = found if found.dtype == np.uint8 else (found * 255 + 0.5).astype(np.uint8)
        assert np.array_equal(found, expected[top:bottom, left:right])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_few_bits_reach_from_black_to_white(tmp_path, bits, photometric):
    pytest.importorskip("imagecodecs")
    values = np.random.default_rng(0).integers(0, 2**bits, (90, 131), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, bitspersample=bits, photometric=photometric)
    expected = np.asarray(read_rgb(tmp_path / "a.tif"))
    found = open_windows(tmp_path / "a.tif").read(10, 20, 47, 100)
    assert np.array_equal(found, expected[10:47, 20:100]) and {found.min(), found.max()} == {0, 255}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_multiplied_by_their_alpha_are_those_of_the_one_reader(tmp_path, dtype):
    largest = np.iinfo(dtype).max
    alpha = np.linspace(0, largest, 131).round().astype(dtype)[None].repeat(90, 0)
    colours = RGB.astype(np.float64) / 255 * alpha[:, :, None]
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.dstack([colours.round().astype(dtype), alpha]),
        photometric="rgb",
        extrasamples=["assocalpha"],
    )
    expected = np.asarray(read_rgb(tmp_path / "a.tif")).astype(int)
    found = open_windows(tmp_path / "a.tif").read(10, 0, 47, 131)
    found = found if found.dtype == np.uint8 else (found * 255 + 0.5).astype(np.uint8)
    assert abs(found - expected[10:47]).max() <= 4  # the reader rounds to 8 bits before it divides
    assert abs(found[:, 100:] - RGB[10:47, 100:].astype(int)).mean() < 40  # near those before, on white


def test_further_bands_are_no_alpha(tmp_path):
    infrared = np.dstack([RGB, 255 - RGB[:, :, 0]])
    tifffile.imwrite(tmp_path / "a.tif", infrared, photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(open_windows(tmp_path / "a.tif").read(0, 0, 90, 131), RGB)
    tifffile.imwrite(tmp_path / "b.tif", infrared, photometric="minisblack", planarconfig="contig")
    with pytest.raises(UsageError, match="4 bands"):
        open_windows(tmp_path / "b.tif")


@pytest.mark.parametrize(
    ("mode", "words"), [("CMYK", "CMYK.*RGB"), ("LAB", "CIELab.*RGB"), ("YCbCr", "YCbCr.*RGB"), ("LA", "2 bands.*grey")]
)
def test_colours_that_windows_cannot_have_are_named(tmp_path, mode, words):
    bands = len(Image.new(mode, (1, 1)).getbands())
    Image.merge(mode, [SMOOTH.convert("L")] * bands).save(tmp_path / "a.tif")
    with pytest.raises(UsageError, match=words):
        open_windows(tmp_path / "a.tif")


def test_volumes_are_no_images(tmp_path):
    options = {"volumetric": True, "tile": (2, 32, 32), "photometric": "rgb"}
    tifffile.imwrite(tmp_path / "a.tif", np.stack([RGB, RGB]), **options)
    with pytest.raises(UsageError, match="volume of 2 slices"):
        open_windows(tmp_path / "a.tif")


@pytest.mark.parametrize("height", [1, 2, 33])
@pytest.mark.parametrize("wide", [True, False])
def test_thin_images(segment, tmp_path, height, wide):
    thin = RGB[:height] if wide else RGB[:, :height]
    tifffile.imwrite(tmp_path / "a.tif", thin, photometric="rgb")
    given = (segment, tmp_path / "a.tif", tmp_path / "map.tif", LABELS, {"size": 32, "overlap": 16})
    if height == 1:
        with pytest.raises(ValueError, match="at least 2"):
            segment_huge(*given)
        assert not (tmp_path / "map.tif").exists()
        return
    segment_huge(*given)
    memory = segment(Image.fromarray(thin), candidate_labels=LABELS, tile=given[-1], output="map")
    assert np.array_equal(tifffile.imread(tmp_path / "map.tif"), memory["map"])


def test_only_what_a_window_touches_is_decoded(tmp_path, aerial, monkeypatch):
    pixels, decoded = TiffPixels(aerial), []
    piece = pixels._piece
    monkeypatch.setattr(pixels, "_piece", lambda index: decoded.append(index) or piece(index))
    pixels[0:32, 0:70]
    assert decoded == [0, 1]
    pixels[0:40, 64:131]  # tile 1 is still there, and tile 0 is forgotten
    assert decoded == [0, 1, 2, 4, 5] and set(pixels.kept) == {1, 2, 4, 5}


def test_a_damaged_tiff_is_named(tmp_path, aerial):
    data = aerial.read_bytes()
    (tmp_path / "cut.tif").write_bytes(data[:-2000])
    with pytest.raises(ValueError, match=r"cut\.tif"):
        open_windows(tmp_path / "cut.tif").read(0, 0, 90, 131)
    (tmp_path / "head.tif").write_bytes(data[:4])
    with pytest.raises(ValueError, match=r"head\.tif"):
        open_windows(tmp_path / "head.tif")


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_damaged_headers_are_refused_in_one_line(tmp_path, aerial, compression):
    """Noise in the first bytes, where tags lie: sizes, types and offsets that make no sense, each in some files."""
    path, rng = tmp_path / "a.tif", np.random.default_rng(0)
    tifffile.imwrite(path, RGB, photometric="rgb", metadata=None, tile=(32, 32), compression=compression)
    data = path.read_bytes()
    for _ in range(150):
        noisy = bytearray(data)
        for place in rng.integers(4, 300, 3):
            noisy[place] = rng.integers(0, 256)
        path.write_bytes(noisy)
        try:
            windows = open_windows(path)
            windows.read(0, 0, min(90, windows.size[0]), min(131, windows.size[1]))
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)


def test_an_image_with_less_data_than_its_size_says_is_refused_at_once(tmp_path):
    path = tmp_path / "a.tif"
    for options in ({"compression": "zlib", "tile": (32, 32)}, {}):
        tifffile.imwrite(path, RGB, photometric="rgb", metadata=None, **options)
        with tifffile.TiffFile(path, mode="r+b") as file:
            file.pages.first.tags["ImageLength"].overwrite(2**30)
        with pytest.raises(UsageError, match=r"a\.tif.*damaged"):
            open_windows(path)


@pytest.mark.parametrize("content", ["cut", "header", "text", "nothing", "archive", "objects"])
def test_files_that_are_no_array_are_named(tmp_path, content):
    path = tmp_path / "a.npy"
    np.save(path, np.array([None], object) if content == "objects" else RGB)
    if content == "archive":
        with path.open("wb") as file:
            np.savez(file, RGB)
    elif content != "objects":
        data = {
            "cut": path.read_bytes()[:-100],
            "header": path.read_bytes()[:30],
            "text": b"road\n" * 9,
            "nothing": b"",
        }
        path.write_bytes(data[content])
    with pytest.raises(UsageError, match=r"a\.npy.*numpy\.save") as caught:
        open_windows(path)
    assert "\n" not in str(caught.value)


def test_limits_on_pixels(aerial, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="max-pixels"):
        open_windows(aerial, max_pixels=10_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    open_windows(aerial)  # read by windows, so that memory is not that of the image
    tifffile.imwrite(tmp_path / "one.tif", RGB, photometric="rgb", compression="zlib", rowsperstrip=90)
    with pytest.raises(ValueError, match="max-pixels"):  # all of it in one strip
        open_windows(tmp_path / "one.tif")
    SMOOTH.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="max-pixels"):  # decoded as a whole
        open_windows(tmp_path / "a.png")


@pytest.mark.parametrize("heights", [[700, 1, 399], [1100], [1] * 20 + [1080]])
def test_strips_of_any_heights_become_tiles(tmp_path, heights):
    labels = np.random.default_rng(0).integers(0, 5, (1100, 600), dtype=np.uint8)
    strips = np.split(labels, np.cumsum(heights)[:-1])
    assert all(tile.shape == (512, 512) for tile in tiles_of_strips(strips, labels.shape, np.uint8))
    write_label_tiff(tmp_path / "map.tif", strips, labels.shape, np.uint8, ["a", "ü"], GEO)
    with tifffile.TiffFile(tmp_path / "map.tif") as file:
        page = file.pages.first
        assert np.array_equal(page.asarray(), labels) and page.is_tiled and page.compression == 8
        assert json.loads(page.description) == {"labels": ["a", "ü"]}
        assert [page.tags[number].value for number, *_ in GEO] == [value for *_, value, _ in GEO]


@pytest.mark.parametrize("rules", [{}, {"threshold": 0.35}, {"min_area": 0.3}, {"threshold": 0.3, "min_area": 0.3}])
def test_a_map_on_disk_is_the_one_in_memory(segment, aerial, tmp_path, rules):
    seen = []
    found = segment_huge(
        segment, aerial, tmp_path / "map.tif", LABELS, TILE, progress=lambda *n: seen.append(n), **rules
    )
    memory = segment(SMOOTH, candidate_labels=LABELS, tile=TILE, output="map", **rules)
    label_map = tifffile.imread(tmp_path / "map.tif")
    assert label_map.dtype == np.uint8 and np.array_equal(label_map, memory["map"])
    assert found.labels == memory["labels"] and np.allclose(found.scores, memory["scores"])
    assert found.pixels == np.bincount(label_map.ravel(), minlength=len(found.labels)).tolist()
    assert seen == [(n + 1, len(seen)) for n in range(len(seen))] and len(seen) > 4
    segment_huge(segment, ImageWindows(RGB), tmp_path / "map.npy", LABELS, TILE, **rules)
    assert np.array_equal(np.load(tmp_path / "map.npy", mmap_mode="r"), label_map)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aerial.tif", "map.npy", "map.tif"]


def test_the_georeference_is_kept(segment, aerial, tmp_path):
    segment_huge(segment, aerial, tmp_path / "map.tif", LABELS, TILE)
    with tifffile.TiffFile(aerial) as before, tifffile.TiffFile(tmp_path / "map.tif") as after:
        for number, *_ in GEO:
            assert after.pages.first.tags[number].value == before.pages.first.tags[number].value
    # a coordinate system alone, without a place
    tifffile.imwrite(tmp_path / "b.tif", RGB, photometric="rgb", metadata=None, extratags=GEO[2:])
    segment_huge(segment, tmp_path / "b.tif", tmp_path / "b_map.tif", LABELS, TILE)
    tags = tifffile.TiffFile(tmp_path / "b_map.tif").pages.first.tags
    assert tags[34735].value == GEO[2][3] and 33550 not in tags and 33922 not in tags
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(tmp_path / "map.tif") as written:
        assert written.crs.to_epsg() == 32632
        assert written.transform == rasterio.transform.from_origin(500_000, 5_400_000, 0.5, 0.5)


def test_a_georeference_beside_the_image_is_found(tmp_path):
    pytest.importorskip("rasterio")
    for name in ("a.tif", "b.png", "c.png"):
        SMOOTH.save(tmp_path / name)
    for name in ("a.tfw", "b.pgw"):
        (tmp_path / name).write_text("0.5\n0\n0\n-0.5\n500000.25\n5399999.75\n")
    for name in ("a.tif", "b.png"):
        tags = {number: value for number, _, _, value, _ in georeference(tmp_path / name)}
        assert tags[33550][:2] == (0.5, 0.5) and tags[33922][3:5] == (500_000, 5_400_000)
    assert georeference(tmp_path / "c.png") == []


def test_a_failure_leaves_the_older_map_and_nothing_else(segment, aerial, tmp_path, monkeypatch):
    target = tmp_path / "map.tif"
    target.write_bytes(b"older")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("tifffile.TiffWriter.write", "spar_hf.batch.huge_images.tempfile.TemporaryFile"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space.*map\.tif"):
            patch.setattr(name, full)
            segment_huge(segment, aerial, target, LABELS, TILE, min_area=0.1)

    def stop(done, tiles):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_huge(segment, aerial, target, LABELS, TILE, progress=stop)
    with pytest.raises(UsageError, match="GiB"), monkeypatch.context() as patch:
        patch.setattr("spar_hf.batch.huge_images.shutil.disk_usage", lambda folder: Usage())
        segment_huge(segment, aerial, target, LABELS, TILE, min_area=0.1)
    with pytest.raises(UsageError, match="GiB"), monkeypatch.context() as patch:  # before the first tile
        patch.setattr("spar_hf.batch.huge_images.shutil.disk_usage", lambda folder: Usage())
        segment_huge(segment, aerial, tmp_path / "map.npy", LABELS, TILE, progress=stop)
    assert target.read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aerial.tif", "map.tif"]


class Usage:
    """A full disk."""

    free = 0


def test_wrong_use_is_refused_before_any_tile(segment, aerial, tmp_path):
    for options, word in [
        ({"target": "map.png"}, "tif"),
        ({"tile": {"size": 48, "overlap": 48}}, "overlap"),
        ({"tile": 8}, "patch"),
        ({"threshold": 2.0}, "threshold"),
        ({"candidate_labels": []}, "label"),
        ({"source": tmp_path / "missing.tif"}, "missing"),
    ]:
        given = {"source": aerial, "target": "map.tif", "candidate_labels": LABELS, "tile": TILE, **options}
        given["target"] = tmp_path / given["target"]
        with pytest.raises((ValueError, FileNotFoundError), match=word):
            segment_huge(segment, progress=lambda *_: pytest.fail("a tile ran"), **given)
    assert [path.name for path in tmp_path.iterdir()] == ["aerial.tif"]


def test_more_than_256_classes_need_sixteen_bits(two_towers, aerial, tmp_path):
    from tiny_models import make_tokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    segment = pipeline(
        "open-vocab-segmentation",
        model=two_towers,
        tokenizer=make_tokenizer(letters=True),
        image_processor=SparImageProcessorPil(),
    )
    labels = [a + b for a in letters for b in letters][:300]
    segment_huge(segment, aerial, tmp_path / "map.tif", labels, 96, templates="plain")
    assert tifffile.imread(tmp_path / "map.tif").dtype == np.uint16


def test_a_map_has_the_colours_of_its_classes(segment, aerial, tmp_path):
    def colours(classes, background):
        return np.array([[10 * i, 0, 100 + (i == background)] for i in range(classes)], np.uint8)

    options = {"background": ["tree"], "colours": colours}
    found = segment_huge(segment, aerial, tmp_path / "map.tif", LABELS, TILE, **options)
    with Image.open(tmp_path / "map.tif") as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), tifffile.imread(tmp_path / "map.tif"))
        assert image.getpalette()[:12] == [0, 0, 100, 10, 0, 100, 20, 0, 100, 30, 0, 101] and found.background == 3
