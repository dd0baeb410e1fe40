"""The image processor against plain Pillow and NumPy."""

import ast
import base64
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_config
from transformers import AutoImageProcessor
from transformers.models.auto import image_processing_auto

import spar_hf
from spar_hf import SparImageProcessorPil, SparVisionModel


def image_array(height: int = 37, width: int = 53, channels: int | None = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width) if channels is None else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def by_hand(levels: np.ndarray) -> np.ndarray:
    """8-bit levels (height, width, 3) -> (3, height, width) in -1 to 1."""
    return (levels.astype(np.float64).transpose(2, 0, 1) / 255 - 0.5) / 0.5


def values(image, **kwargs) -> np.ndarray:
    """`pixel_values` of one image."""
    return SparImageProcessorPil()(image, return_tensors="np", **kwargs)["pixel_values"][0]


def assert_shows(image, levels: np.ndarray, **kwargs):
    """The processor reads `image` as these 8-bit RGB levels."""
    np.testing.assert_allclose(values(image, **kwargs), by_hand(levels), atol=1e-6)


def test_native_size_is_only_normalised():
    array = image_array(37, 53)
    inputs = SparImageProcessorPil()(Image.fromarray(array), return_tensors="pt")
    assert inputs.pixel_values.dtype == torch.float32
    assert inputs.pixel_values.shape == (1, 3, 37, 53)
    np.testing.assert_allclose(inputs.pixel_values[0].numpy(), by_hand(array), atol=1e-6)
    assert inputs.original_sizes == [(37, 53)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (None, (37, 53)),
        ({"shortest_edge": 64}, (64, 92)),  # 91.68
        (64, (64, 92)),
        ({"shortest_edge": 16}, (16, 23)),  # 22.92
        ({"longest_edge": 32}, (22, 32)),  # 22.34
        ({"longest_edge": 106}, (74, 106)),
        ({"shortest_edge": 64, "longest_edge": 200}, (64, 92)),
        ({"shortest_edge": 64, "longest_edge": 80}, (56, 80)),  # 55.85
        ({"height": 20, "width": 31}, (20, 31)),
        ([20, 31], (20, 31)),
    ],
)
def test_resize_is_pillows_antialiased_bicubic(size, expected):
    image = Image.fromarray(image_array(37, 53))
    inputs = SparImageProcessorPil(size=size)(image, return_tensors="np")
    assert inputs["pixel_values"].shape[2:] == expected
    resized = np.asarray(image.resize(expected[::-1], Image.Resampling.BICUBIC))
    np.testing.assert_allclose(inputs["pixel_values"][0], by_hand(resized), atol=1e-6)
    assert inputs["original_sizes"] == [(37, 53)]


def test_resize__portrait_and_a_side_that_would_vanish():
    image = Image.fromarray(image_array(53, 37))
    assert values(image, size={"shortest_edge": 16}).shape == (3, 23, 16)
    assert values(Image.new("RGB", (400, 2)), size={"longest_edge": 50}).shape == (3, 1, 50)


def test_resize__halves_are_rounded_up_on_each_side():
    assert values(Image.new("RGB", (30, 20)), size={"shortest_edge": 15}).shape == (3, 15, 23)  # 22.5
    assert values(Image.new("RGB", (20, 34)), size={"shortest_edge": 15}).shape == (3, 26, 15)  # 25.5


def test_options_at_the_call_win():
    image_processor = SparImageProcessorPil(size={"shortest_edge": 16})
    image = Image.fromarray(image_array(37, 53))
    np.testing.assert_allclose(
        image_processor(image, size=None)["pixel_values"][0], by_hand(image_array(37, 53)), atol=1e-6
    )
    assert image_processor(image, do_resize=False)["pixel_values"][0].shape == (3, 37, 53)
    levels = image_processor(image, do_resize=False, do_rescale=False, do_normalize=False)["pixel_values"][0]
    np.testing.assert_array_equal(levels, image_array(37, 53).transpose(2, 0, 1))
    nearest = image_processor(image, resample=Image.Resampling.NEAREST)["pixel_values"][0]
    expected = by_hand(np.asarray(image.resize((23, 16), Image.Resampling.NEAREST)))
    np.testing.assert_allclose(nearest, expected, atol=1e-6)


def test_normalise_per_channel():
    array = image_array()
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    expected = (array / 255 - np.array(mean)) / np.array(std)
    result = values(Image.fromarray(array), image_mean=mean, image_std=std)
    np.testing.assert_allclose(result, expected.transpose(2, 0, 1), atol=1e-6)
    with pytest.raises(ValueError, match="positive"):
        values(Image.fromarray(array), image_std=[0.5, 0.5, 0.0])


# the array a camera stores for an upright one, by EXIF orientation
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation, tmp_path):
    upright = image_array(20, 31)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.png"
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))).save(path, exif=exif)
    for source in (path, str(path), Image.open(path)):
        inputs = SparImageProcessorPil()(source, return_tensors="np")
        np.testing.assert_allclose(inputs["pixel_values"][0], by_hand(upright), atol=1e-6)
        assert inputs["original_sizes"] == [(20, 31)]


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[:, :, 3:] / 255
    return rgba[:, :, :3] * alpha + 255 * (1 - alpha)


def test_transparent_pixels_lie_over_white():
    rgba = image_array(channels=4)
    one_level = 2 / 255  # Pillow composites in whole levels
    for image in (Image.fromarray(rgba), rgba, rgba.transpose(2, 0, 1)):
        np.testing.assert_allclose(values(image), by_hand(over_white(rgba)), atol=one_level)
    np.testing.assert_allclose(values(rgba / 255), by_hand(over_white(rgba)), atol=1e-6)
    grey = image_array(channels=2)
    expected = over_white(grey[:, :, [0, 0, 0, 1]])
    np.testing.assert_allclose(
        values(Image.merge("LA", [Image.fromarray(np.ascontiguousarray(c)) for c in grey.transpose(2, 0, 1)])),
        by_hand(expected),
        atol=one_level,
    )


def test_palette_with_and_without_transparency(tmp_path):
    index = image_array(channels=None) % 3
    image = Image.fromarray(index)
    image.putpalette([255, 0, 0, 0, 128, 0, 0, 0, 255])
    assert image.mode == "P"
    palette = np.array([[255, 0, 0], [0, 128, 0], [0, 0, 255]], dtype=np.uint8)
    assert_shows(image, palette[index])
    image.save(tmp_path / "holes.png", transparency=1)
    palette[1] = 255
    assert_shows(tmp_path / "holes.png", palette[index])


def test_grey_black_and_white_and_cmyk():
    grey = image_array(channels=None)
    assert_shows(Image.fromarray(grey), np.stack([grey] * 3, 2))
    mask = grey > 127
    black_and_white = np.stack([mask] * 3, 2).astype(np.uint8) * 255
    assert_shows(Image.fromarray(mask), black_and_white)
    assert_shows(mask, black_and_white)
    cmyk = image_array(channels=4)
    image = Image.merge("CMYK", [Image.fromarray(np.ascontiguousarray(ink)) for ink in cmyk.transpose(2, 0, 1)])
    expected = by_hand((255 - cmyk[:, :, :3]) * (1 - cmyk[:, :, 3:] / 255))
    np.testing.assert_allclose(values(image), expected, atol=2 * 2 / 255)


def test_16_bit_is_scaled_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 37 * 53).astype(np.uint16).reshape(37, 53)
    expected = np.stack([np.round(deep / 257)] * 3, 2).astype(np.uint8)
    assert expected.min() == 0 and expected.max() == 255
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    big_endian = Image.frombytes("I;16B", (53, 37), deep.astype(">u2").tobytes())
    sources = [
        Image.fromarray(deep),
        Image.fromarray(deep.astype(np.int32)),
        big_endian,
        tmp_path / "deep.png",
        str(tmp_path / "deep.tif"),
        deep,
        torch.from_numpy(deep),
        np.stack([deep] * 3),
    ]
    for source in sources:
        assert_shows(source, expected)


def test_32_bit_integers_that_are_no_16_bit_levels():
    for high in (200, 70000):
        array = np.zeros((8, 8), dtype=np.int32)
        array[0, 0] = high
        with pytest.raises(ValueError, match="uint8 or uint16"):
            values(Image.fromarray(array))
    assert values(Image.new("I", (8, 8))).max() == -1  # black is black in any range


@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy])
def test_array_layouts(wrap):
    array = image_array()
    assert_shows(wrap(array), array)
    assert_shows(wrap(np.ascontiguousarray(array.transpose(2, 0, 1))), array)
    grey = image_array(channels=None)
    for layout in (grey, grey[None], grey[:, :, None]):
        assert_shows(wrap(layout), np.stack([grey] * 3, 2))


def test_ambiguous_layout_needs_a_word():
    array = image_array(3, 40)
    with pytest.raises(ValueError, match=r"\(3, 40, 3\) is ambiguous.*input_data_format='channels_first'"):
        values(array)
    assert_shows(array, array, input_data_format="channels_last")
    assert_shows(array, array.transpose(1, 2, 0), input_data_format="channels_first")


def test_float_pixels_are_zero_to_one_and_not_rescaled_twice():
    array = image_array()
    exact = array / 255 * 0.999  # not a multiple of 1 / 255: the precision of floats must survive
    expected = (exact.transpose(2, 0, 1) - 0.5) / 0.5
    for image in (exact, exact.astype(np.float32), torch.from_numpy(exact).permute(2, 0, 1)):
        np.testing.assert_allclose(values(image), expected, atol=1e-6)
        np.testing.assert_allclose(values(image, do_rescale=False), expected, atol=1e-6)
    for dtype, tolerance in ((torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        np.testing.assert_allclose(values(torch.from_numpy(exact).to(dtype)), expected, atol=tolerance)
    grey = exact[:, :, 0].astype(np.float32)
    np.testing.assert_allclose(values(Image.fromarray(grey)), np.stack([expected[0]] * 3), atol=1e-6)


def test_float_pixels_are_resized_like_levels():
    array = image_array() // 2 + 64  # away from black and white, where Pillow clips levels between its two passes
    levels = values(Image.fromarray(array), size={"shortest_edge": 20})
    floats = values(array / 255, size={"shortest_edge": 20})
    np.testing.assert_allclose(floats, levels, atol=2 * 2 / 255)  # levels are rounded after each pass
    channel = Image.fromarray(np.float32(array[:, :, 1] / 255)).resize((29, 20), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(floats[1], (np.asarray(channel) - 0.5) / 0.5, atol=1e-6)
    black_and_white = np.kron(np.indices((6, 6)).sum(0) % 2, np.ones((4, 4)))
    assert np.abs(values(black_and_white, size={"shortest_edge": 50})).max() <= 1  # no overshoot


def test_input_is_left_as_it_was():
    array, floats = image_array(), image_array() / np.float32(255)
    before, floats_before = array.copy(), floats.copy()
    SparImageProcessorPil(size=20)([array, floats])
    SparImageProcessorPil()(floats.transpose(2, 0, 1), do_normalize=False)["pixel_values"][0][:] = 7
    np.testing.assert_array_equal(array, before)
    np.testing.assert_array_equal(floats, floats_before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((8, 8, 3), np.nan), "NaN"),
        (np.full((8, 8, 3), np.inf, dtype=np.float32), "NaN or infinite"),
        (image_array().astype(np.float32), "Divide levels of 0–255 by 255"),
        (image_array() / 127.5 - 1, "do not normalise"),
        (image_array().astype(np.int64), "this one is int64"),
        (np.zeros((8, 8, 3), dtype=complex), "complex128"),
        (np.zeros((0, 8, 3), dtype=np.uint8), "0 × 8 pixels"),
        (np.zeros((1, 8), dtype=np.uint8), "1 × 8 pixels.*at least 2"),
        (Image.new("RGB", (1, 1)), "1 × 1 pixels"),
        (Image.new("RGB", (0, 5)), "5 × 0 pixels"),
        (np.zeros((8,), dtype=np.uint8), r"shape \(8,\)"),
        (np.zeros((1, 2, 8, 8, 3), dtype=np.uint8), "four axes"),
        (np.zeros((8, 8, 5), dtype=np.uint8), "no axis of 1, 3 or 4 channels"),
        ([], "There is no image"),
        (np.zeros((0, 8, 8, 3), dtype=np.uint8), "There is no image"),
    ],
)
def test_bad_pixels(image, message):
    with pytest.raises(ValueError, match=message):
        values(image)


@pytest.mark.parametrize("image", [None, 3, [[Image.new("RGB", (8, 8))]], {"path": "a.jpg"}])
def test_no_image_at_all(image):
    with pytest.raises(TypeError, match=r"a path, a URL.* a PIL image, a NumPy array or a torch tensor"):
        values(image)


def test_bad_files(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match=r"empty.jpg.*0 bytes"):
        values(tmp_path / "empty.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text.jpg.*no image that Pillow can read"):
        values(str(tmp_path / "text.jpg"))
    for suffix in ("jpg", "png"):
        whole = BytesIO()
        Image.fromarray(image_array(100, 100)).save(whole, {"jpg": "JPEG", "png": "PNG"}[suffix])
        path = tmp_path / f"half.{suffix}"
        path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        for source in (path, Image.open(path)):
            with pytest.raises(ValueError, match="truncated"):
                values(source)
    with pytest.raises(ValueError, match="is a folder"):
        values(tmp_path)
    for missing in ("missing.jpg", "x" * 5000, tmp_path / "missing.jpg"):
        with pytest.raises(FileNotFoundError, match="neither a file nor a URL"):
            values(missing)


@pytest.fixture
def web(tmp_path, monkeypatch):
    """URL of a local server for `tmp_path`."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_url_is_read_as_the_file_is(web, tmp_path):
    deep = (np.arange(37 * 53, dtype=np.uint16) * 33).reshape(37, 53)
    Image.fromarray(deep).save(tmp_path / "an image.png")
    assert_shows(f"{web}/an image.png", np.stack([np.round(deep / 257)] * 3, 2))
    with pytest.raises(ConnectionError, match="404"):
        values(f"{web}/missing.png")
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(ValueError, match="no image"):
        values(f"{web}/page.png")


def test_url__nobody_answers(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ConnectionError, match=r"Cannot download 'http://127.0.0.1:9/"):
        values("http://127.0.0.1:9/image.png")


def test_data_url():
    array, file = image_array(), BytesIO()
    Image.fromarray(array).save(file, "PNG")
    assert_shows("data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), array)
    with pytest.raises(ConnectionError, match="Cannot download 'data:image/png"):
        values("data:image/png;base64")


def test_batch_of_equal_sizes(tmp_path):
    arrays = [image_array(seed=seed) for seed in range(4)]
    Image.fromarray(arrays[0]).save(tmp_path / "0.png")
    mixed = [tmp_path / "0.png", Image.fromarray(arrays[1]), arrays[2], torch.from_numpy(arrays[3]) / 255]
    expected = np.stack([by_hand(array) for array in arrays])
    for batch in (mixed, tuple(mixed), np.stack(arrays), torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)):
        inputs = SparImageProcessorPil()(batch, return_tensors="pt")
        np.testing.assert_allclose(inputs.pixel_values.numpy(), expected, atol=1e-6)
        assert inputs.original_sizes == [(37, 53)] * 4


def test_unequal_sizes_are_not_stacked():
    images = [Image.fromarray(image_array(37, 53)), Image.fromarray(image_array(53, 37))]
    image_processor = SparImageProcessorPil()
    for kind in ("pt", "np"):
        with pytest.raises(ValueError, match=r"\(37, 53\), \(53, 37\).*Group them by size.*return_tensors=None"):
            image_processor(images, return_tensors=kind)
    inputs = image_processor(images)
    assert [image.shape for image in inputs["pixel_values"]] == [(3, 37, 53), (3, 53, 37)]
    assert inputs["original_sizes"] == [(37, 53), (53, 37)]
    inputs = image_processor(images, size={"height": 16, "width": 24}, return_tensors="pt")
    assert inputs.pixel_values.shape == (2, 3, 16, 24)
    assert inputs.original_sizes == [(37, 53), (53, 37)]


def test_inputs_go_to_a_device_and_into_the_model(vision_model):
    inputs = SparImageProcessorPil()(Image.fromarray(image_array(37, 53)), return_tensors="pt")
    moved = inputs.to("cpu", torch.bfloat16)
    assert moved.pixel_values.dtype == torch.bfloat16
    assert moved.original_sizes == [(37, 53)]
    assert vision_model(**inputs).feature_map.shape[2:] == (3, 4)


@pytest.mark.parametrize(
    "size",
    [
        {},
        {"height": 20},
        {"shortest_edge": 0},
        {"longest_edge": -3},
        {"shortest_edge": 22.5},
        {"max_height": 20, "max_width": 20},
        (0, 3),
        "big",
    ],
)
def test_impossible_size(size):
    with pytest.raises(ValueError, match=r"`size` is .*shortest_edge"):
        SparImageProcessorPil(size=size)


@pytest.mark.parametrize("option", [{"do_pad": True}, {"do_center_crop": True}, {"data_format": "channels_last"}])
def test_what_it_does_not_do_is_refused(option):
    with pytest.raises(ValueError, match=r"Leave `do_pad`|Leave `data_format`"):
        SparImageProcessorPil(**option)
    with pytest.raises(ValueError, match=r"Leave `do_pad`|Leave `data_format`"):
        SparImageProcessorPil()(Image.new("RGB", (8, 8)), **option)


def test_without_conversion_only_rgb_is_taken():
    image_processor = SparImageProcessorPil(do_convert_rgb=False)
    np.testing.assert_allclose(image_processor(image_array())["pixel_values"][0], by_hand(image_array()), atol=1e-6)
    for image in (Image.new("L", (8, 8)), np.zeros((8, 8, 4), dtype=np.uint8)):
        with pytest.raises(ValueError, match="do_convert_rgb"):
            image_processor(image)


CUSTOM = {
    "size": {"shortest_edge": 24, "longest_edge": 30},
    "resample": Image.Resampling.BILINEAR,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


def test_save_and_load_in_a_fresh_process(tmp_path):
    """A vision-only folder: weights, configuration, image processor."""
    image_processor = SparImageProcessorPil(**CUSTOM)
    SparVisionModel(tiny_config(text_config=None)).save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    image = Image.fromarray(image_array())
    image.save(tmp_path / "image.png")
    code = (
        "import json, sys, numpy, spar_hf; from transformers import AutoImageProcessor; "
        "image_processor = AutoImageProcessor.from_pretrained(sys.argv[1]); "
        "numpy.save(sys.argv[1] + '/values.npy', image_processor(sys.argv[1] + '/image.png')['pixel_values'][0]); "
        "print(json.dumps([type(image_processor).__name__, image_processor.to_dict()]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    name, loaded = json.loads(result.stdout)
    assert name == "SparImageProcessorPil"
    assert loaded == json.loads(image_processor.to_json_string())
    np.testing.assert_array_equal(np.load(tmp_path / "values.npy"), image_processor(image)["pixel_values"][0])
    assert "Warning" not in result.stderr and "backend" not in result.stderr, result.stderr


def test_save_and_load__defaults(tmp_path):
    SparImageProcessorPil().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path).to_dict()
    loaded.pop("auto_map")  # says where the code beside it is
    assert loaded == SparImageProcessorPil().to_dict()


def test_options_at_loading_win(tmp_path):
    SparImageProcessorPil(size={"shortest_edge": 24}).save_pretrained(tmp_path)
    assert SparImageProcessorPil.from_pretrained(tmp_path, size={"longest_edge": 16}).size == {"longest_edge": 16}
    assert SparImageProcessorPil.from_pretrained(tmp_path, size=None).size is None


def test_auto_class_is_quiet_where_torchvision_is_installed(tmp_path, monkeypatch):
    SparImageProcessorPil().save_pretrained(tmp_path)
    warnings: list[str] = []
    monkeypatch.setattr(image_processing_auto, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(image_processing_auto.logger, "warning_once", warnings.append)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is SparImageProcessorPil
    assert warnings == []


@pytest.mark.parametrize("module", ["image_processing_spar", "processing_spar"])
def test_files_that_travel_with_checkpoints_import_nothing_unusual(module):
    source = (Path(spar_hf.__file__).parent / "model" / f"{module}.py").read_text(encoding="utf-8")
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or (node.level == 1 and "." not in node.module), "siblings only, as `.name`"
            names |= set() if node.level else {node.module.split(".")[0]}
    assert names - sys.stdlib_module_names <= {"torch", "transformers", "tokenizers", "PIL", "numpy"}
