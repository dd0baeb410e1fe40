"""Reading images: containers, ranges of pixels, files that are no images, and limits of downloads."""

import io
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import pipeline

from spar_hf.model.downloads import download
from spar_hf.model.image_input import read_image, read_rgb
from spar_hf.model.image_processing_spar import SparImageProcessorPil
from spar_hf.model.image_windows import ImageWindows

LABELS = ["road", "sky"]
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (90, 90, 90)]


@pytest.fixture(scope="module")
def segment():
    return pipeline("open-vocab-segmentation")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four images of different widths, so that every result tells whose it is."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        Image.new("RGB", (33 + i, 32), COLOURS[i]).save(path)
    return paths


def widths(results):
    return [result["map"].shape[1] for result in results]


def containers(files):
    paths = [str(path) for path in files]
    features = datasets.Features({"image": datasets.Image(), "photo": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": paths, "photo": paths}, features=features)
    series = pd.Series(paths, index=[2, 0, 3, 1])
    strings = pd.Series(["x", *paths])
    return {
        "series": series,
        "filtered series": strings[strings != "x"],
        "series of names": pd.Series(paths, index=list("dbca")),
        "index": pd.Index(paths),
        "array of strings": np.array(paths),
        "array of objects": np.array(files, dtype=object),
        "tuple": tuple(paths),
        "dict values": dict(enumerate(paths)).values(),
        "generator": (path for path in paths),
        "column": table["image"],
        "column of another name": table["photo"],
        "streamed column": table.to_iterable_dataset()["photo"],
        "column of paths": datasets.Dataset.from_dict({"path": paths})["path"],
        "table": table,
        "bytes": [path.read_bytes() for path in files],
        "bytearray, memoryview": [bytearray(files[0].read_bytes()), memoryview(files[1].read_bytes()), *files[2:]],
        "open files": [path.open("rb") for path in files[:2]] + [io.BytesIO(p.read_bytes()) for p in files[2:]],
    }


@pytest.mark.parametrize("kind", [
    "series", "filtered series", "series of names", "index", "array of strings", "array of objects", "tuple",
    "dict values", "generator", "column", "column of another name", "streamed column", "column of paths", "table",
    "bytes", "bytearray, memoryview", "open files",
])  # fmt: skip
def test_containers_give_results_in_their_order(segment, files, kind):
    results = segment(containers(files)[kind], candidate_labels=LABELS, output="map", size=32)
    assert widths(results) == [33, 34, 35, 36]
    encoded = segment.encode(containers(files)[kind], size=32)
    assert [item.original_size[1] for item in encoded] == [33, 34, 35, 36]


def test_the_image_processor_takes_the_same_containers(files):
    processor, paths = SparImageProcessorPil(), [str(path) for path in files]
    for images in (pd.Series(paths, index=[2, 0, 3, 1]), np.array(paths), [path.read_bytes() for path in files]):
        assert [width for _, width in processor(images)["original_sizes"]] == [33, 34, 35, 36]
    with files[1].open("rb") as file:
        assert processor(file)["original_sizes"] == [(32, 34)]
    with pytest.raises(ValueError, match="DataFrame has several columns"):
        processor(pd.DataFrame({"path": paths}))


def test_single_images_of_every_kind(segment, files):
    for source in (files[2], str(files[2]), files[2].read_bytes(), bytearray(files[2].read_bytes())):
        assert segment(source, candidate_labels=LABELS, output="map")["map"].shape == (32, 35)
    with files[2].open("rb") as file:
        assert segment(file, candidate_labels=LABELS, output="map")["map"].shape == (32, 35)


class Pairs(torch.utils.data.Dataset):
    """A data set as those of torchvision: image and label."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return Image.new("RGB", (32, 32)), index


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (pd.DataFrame({"path": ["a.png"]}), r"DataFrame has several columns.*table\["),
        ({"a.png", "b.png"}, "set has no order"),
        (Pairs(), r"tuple of 2 parts \(Image, int\).*item\[0\]"),
        ([(Image.new("RGB", (32, 32)), 1)], "tuple of 2 parts"),
    ],
)
def test_other_containers_are_refused_by_name(segment, inputs, message):
    with pytest.raises(ValueError, match=message):
        list(segment(inputs, candidate_labels=LABELS))
    with pytest.raises(ValueError, match=message):
        segment.encode(inputs)


def test_an_open_file_may_be_given_again(segment, files):
    """Twice in a list, or to a second call."""
    with files[0].open("rb") as file, files[1].open("rb") as other:
        for _ in range(2):
            assert widths(segment([file, other, file], candidate_labels=LABELS, output="map")) == [33, 34, 33]


def test_a_file_at_its_end_is_told(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "png")
    with pytest.raises(ValueError, match=r"at its end.*seek\(0\)"):
        read_image(buffer)
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match="0 bytes"):
        read_image(tmp_path / "a.png")


def test_text_files_are_refused(tmp_path):
    (tmp_path / "a.png").write_text("text")
    with (tmp_path / "a.png").open() as file, pytest.raises(TypeError, match='"rb"'):
        read_image(file)


def test_a_broken_image_of_a_column_stops_no_other(segment, files, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"broken")
    paths = [str(files[0]), str(tmp_path / "broken.png"), str(files[2])]
    table = datasets.Dataset.from_dict({"photo": paths}).cast_column("photo", datasets.Image())
    first, error, last = segment(table["photo"], candidate_labels=LABELS, output="map", on_error="skip", size=32)
    assert widths([first, last]) == [33, 35] and "no image" in error["error"]


def gradient(high, dtype):
    return np.linspace(0, high, 40 * 48).reshape(40, 48).astype(dtype)


def test_float_files_are_0_to_1_for_every_reader(tmp_path):
    floats = gradient(1, np.float32)
    Image.fromarray(floats).save(tmp_path / "f.tif")
    expected = np.floor(floats * 255 + 0.5).astype(np.uint8)
    rgb = np.asarray(read_rgb(tmp_path / "f.tif"))
    assert np.array_equal(rgb, np.stack([expected] * 3, 2))
    pixels = SparImageProcessorPil(do_normalize=False)(tmp_path / "f.tif")["pixel_values"][0]
    np.testing.assert_allclose(pixels[0], floats, atol=1e-6)  # floats keep their precision there


@pytest.mark.parametrize("high", [255, 4095, -1])
def test_floats_of_another_range_need_it_stated(tmp_path, high):
    Image.fromarray(gradient(high, np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match=r"image_range=\(LOW, HIGH\)"):
        read_rgb(tmp_path / "f.tif")
    if high > 0:
        rgb = np.asarray(read_rgb(tmp_path / "f.tif", image_range=(0, high)))
        np.testing.assert_allclose(rgb[:, :, 0], gradient(255, np.float64), atol=0.51)


def test_pixels_that_are_no_number(tmp_path):
    for value in (np.nan, np.inf):
        floats = gradient(1, np.float32)
        floats[3, 4] = value
        Image.fromarray(floats).save(tmp_path / "f.tif")
        for image_range in (None, (0, 1)):
            with pytest.raises(ValueError, match="NaN or infinite"):
                read_rgb(tmp_path / "f.tif", image_range)


@pytest.mark.parametrize("high", [1, 200, 1023, 4095, 10000, 16383])
@pytest.mark.parametrize("kind", ["array", "I;16", "I;16B", "I", "png", "tif", "tensor"])
def test_sixteen_bits_that_may_be_fewer_are_refused_and_scaled_as_stated(tmp_path, kind, high):
    levels = gradient(high, np.uint16)
    image = Image.fromarray(levels)
    sources = {
        "array": levels, "I;16": image, "I": Image.fromarray(levels.astype(np.int32)), "tensor": torch.from_numpy(levels),
        "I;16B": Image.frombytes("I;16B", (48, 40), levels.astype(">u2").tobytes()),
    }  # fmt: skip
    if kind in ("png", "tif"):
        image.save(tmp_path / f"x.{kind}")
    source = sources.get(kind, tmp_path / f"x.{kind}")
    processor = SparImageProcessorPil(do_normalize=False)
    with pytest.raises(ValueError, match="--image-range LOW HIGH"):
        processor(source)
    for image_range in ((0, high), (0, 65535)):
        pixels = processor(source, image_range=image_range)["pixel_values"][0]
        np.testing.assert_allclose(pixels[1], levels / image_range[1], atol=1e-6)


@pytest.mark.parametrize("image_range", [None, (0, 65535)])
def test_the_transparent_level_of_a_sixteen_bit_png_is_white(tmp_path, image_range):
    file = tmp_path / "grey.png"
    Image.fromarray(np.array([[0, 1000, 1001, 65535]] * 2, np.uint16)).save(file, transparency=1000)
    read = np.asarray(read_rgb(file, image_range))
    assert read[0, :, 0].tolist() == [0, 255, 4, 255] and (read == read[..., :1]).all()
    assert np.array_equal(ImageWindows(str(file), image_range).read(0, 1, 2, 4), read[:, 1:])
    pixels = SparImageProcessorPil(do_normalize=False, do_resize=False)(file, image_range=image_range)["pixel_values"]
    np.testing.assert_allclose(pixels[0][:, :2, :4], read.transpose(2, 0, 1) / 255, atol=1e-6)


def test_full_sixteen_bits_need_nothing():
    levels = np.full((8, 8), 16384, np.uint16)
    assert SparImageProcessorPil(do_rescale=False, do_normalize=False)(levels)["pixel_values"][0].max() == 64
    assert SparImageProcessorPil(do_normalize=False)(levels * 0)["pixel_values"][0].max() == 0


def test_sixteen_bit_colour_of_fewer_bits_is_refused(tmp_path):
    """Pillow reads the upper 8 of 16 bits, in which values of 12 bits are nearly black."""
    import struct
    import zlib

    def png(levels, transparent=None):
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
        colour = [] if transparent is None else [(b"tRNS", struct.pack(">HHH", *transparent))]
        parts = [
            (b"IHDR", struct.pack(">IIBBBBB", *levels.shape[1::-1], 16, 2, 0, 0, 0)),
            *colour,
            (b"IDAT", zlib.compress(rows)),
        ]
        chunks = [
            struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
            for k, d in [*parts, (b"IEND", b"")]
        ]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)

    levels = np.repeat(gradient(65535, np.uint16)[:, :, None], 3, 2)
    np.testing.assert_allclose(np.asarray(read_rgb(png(levels))), levels / 257, atol=1)
    with pytest.raises(ValueError, match="16 bits per channel"):
        read_rgb(png(levels // 16))
    with pytest.raises(ValueError, match="16 bits per channel"):
        SparImageProcessorPil()(Image.open(io.BytesIO(png(levels // 16))))
    with pytest.raises(ValueError, match="range of 0 to 4095 is too small"):
        read_rgb(png(levels // 16), (0, 4095))
    assert not np.asarray(read_rgb(png(levels * 0))).any()
    processor = SparImageProcessorPil(do_normalize=False)
    for image_range in ((0, 20_000), (1000, 30_000)):
        low, high = image_range
        given = (low + levels.astype(np.uint32) * (high - low) // 65535).astype(np.uint16)
        for source in (png(given), Image.open(io.BytesIO(png(given)))):
            pixels = processor(source, image_range=image_range)["pixel_values"][0]
            np.testing.assert_allclose(pixels.transpose(1, 2, 0), levels / 65535, atol=256 / (high - low) + 0.002)
        windows = ImageWindows(png(given), image_range)
        whole = np.asarray(read_rgb(png(given), image_range))
        assert np.array_equal(windows.read(8, 16, 30, 40), whole[8:30, 16:40])
    read_rgb(png(np.full_like(levels, 20_000)), (0, 20_000))  # no pixel is outside
    glass = levels.copy()
    glass[:8] = (65535, 0, 0)
    for image_range in (None, (0, 65535)):
        assert (np.asarray(read_rgb(png(glass, (65535, 0, 0)), image_range))[:8] == 255).all()
    read_rgb(png(np.full_like(levels, 1000)), (1000, 30_000))


@pytest.mark.parametrize("image_range", [(1, 0), (0, 0), 5, "ab", (0, float("nan")), (0, 1, 2)])
def test_impossible_ranges(segment, image_range):
    with pytest.raises(ValueError, match="LOW < HIGH"):
        segment(np.zeros((32, 32), np.uint16), candidate_labels=LABELS, image_range=image_range)


def test_a_range_that_fits_no_pixel_is_refused_and_8_bits_have_their_own(segment):
    with pytest.raises(ValueError, match="Most pixels lie outside"):
        segment(gradient(4095, np.uint16), candidate_labels=LABELS, image_range=(0, 1))
    picture = Image.new("RGB", (32, 32), (90, 120, 10))
    plain, ranged = (
        segment(picture, candidate_labels=LABELS, output="logits", **o) for o in ({}, {"image_range": (0, 4095)})
    )
    assert np.array_equal(plain["logits"], ranged["logits"])
    assert segment.encode(gradient(4095, np.uint16), image_range=(0, 4095)).original_size == (40, 48)


def test_pipes_devices_and_postscript_are_refused(tmp_path):
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").symlink_to("/dev/zero")
    for name in ("b.jpg", "c.jpg"):
        with pytest.raises(ValueError, match="no regular file"):
            read_image(tmp_path / name)
    (tmp_path / "e.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="no image"):
        read_image(tmp_path / "e.png")


def test_pixel_limit_holds_before_decoding(tmp_path, monkeypatch):
    Image.new("L", (300, 200)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 59_999)
    with pytest.raises(ValueError, match="--max-pixels"):
        read_image(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    assert read_image(tmp_path / "large.png").size == (300, 200)


@pytest.fixture
def server(monkeypatch):
    """Serves `/large` without an end, `/loop` that redirects for ever, `/file` that redirects to a file, and `/ok`."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            target = {"/loop": f"/loop{self.path[5:]}x", "/file": "file:///etc/hostname"}.get(self.path[:5])
            self.send_response(302 if target else 200)
            if target:
                self.send_header("Location", target)
            self.end_headers()
            if self.path == "/large":
                try:
                    while True:
                        self.wfile.write(bytes(2**16))
                except OSError:
                    pass
            elif not target:
                self.wfile.write(b"fine")

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_downloads_are_limited(server):
    assert download(f"{server}/ok") == b"fine"
    with pytest.raises(ConnectionError, match="larger than 1000000 bytes"):
        download(f"{server}/large", max_bytes=10**6)
    for path in ("loop", "file"):
        with pytest.raises(ConnectionError, match="Cannot download"):
            download(f"{server}/{path}")
    with pytest.raises(ConnectionError, match="scheme"):
        download("file:///etc/hostname")


def test_servers_reach_no_private_address(server):
    for url in (
        f"{server}/ok",
        server.replace("127.0.0.1", "localhost"),
        "http://[::1]/",
        "http://169.254.169.254/",
        "http://2130706433/",
    ):
        with pytest.raises(ConnectionError, match=r"private address|Cannot download"):
            download(url, private=False)
    with pytest.raises(ConnectionError, match="private address"):
        read_image(f"{server}/ok", urls="public")
    with pytest.raises(ValueError, match="is a URL"):
        read_image(f"{server}/ok", urls=False)
