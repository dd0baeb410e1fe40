"""`spar-hf segment clip.mp4`: a video with masks over it, its sound and its times."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from videos import COLOURS, TIMES, write_clip

from spar_hf.batch.video_files import VideoReader, repaint_video
from spar_hf.cli.main import app
from spar_hf.cli.overlays import legend_strip, palette
from spar_hf.cli.video import SMOOTHING
from spar_hf.model.video import FrameAverage


def read_clip(path):
    """Times in seconds and pictures of the frames; name and packets of the sound."""
    with av.open(str(path)) as clip:
        frames = [(float(frame.time), frame.to_image()) for frame in clip.decode(video=0)]
    with av.open(str(path)) as clip:
        if not clip.streams.audio:
            return frames, None, []
        sound = clip.streams.audio[0]
        return (
            frames,
            sound.codec_context.name,
            [bytes(packet) for packet in clip.demux(sound) if packet.dts is not None],
        )


def segment_clip(clip, output, model, *more):
    words = ["--labels", "road; car; sky", "--model", str(model), "--shortest-edge", "48"]
    return CliRunner().invoke(app, ["segment", str(clip), "--output", str(output), *words, *map(str, more)])


def test_frames_keep_their_times_and_the_sound_its_packets(tmp_path, base_folder):
    clip, output = write_clip(tmp_path / "clip.mp4"), tmp_path / "new" / "out.mp4"
    result = segment_clip(clip, output, base_folder)
    assert result.exit_code == 0, result.output
    assert "7 frames, 7 of them segmented" in result.output
    frames, name, packets = read_clip(clip)
    painted, new_name, new_packets = read_clip(output)
    assert [time for time, _ in painted] == pytest.approx([time for time, _ in frames], abs=1e-3)
    assert (new_name, new_packets) == (name, packets) and name == "aac" and len(packets) > 10
    assert [path.name for path in output.parent.iterdir()] == ["out.mp4"]
    # every picture is its original with colours over it, and a legend below
    for (_, image), (_, picture) in zip(frames, painted, strict=True):
        assert picture.width == image.width and picture.height > image.height


def test_masks_of_every_second_frame_lie_on_the_next_one_too(tmp_path, base_folder, monkeypatch):
    from spar_hf.cli import overlays

    drawn = []
    overlay = overlays.overlay

    def recorded(image, label_map, *others, **options):
        drawn.append((np.asarray(image).mean((0, 1)), label_map))
        return overlay(image, label_map, *others, **options)

    monkeypatch.setattr(overlays, "overlay", recorded)
    result = segment_clip(
        write_clip(tmp_path / "clip.mp4"), tmp_path / "out.mp4", base_folder, "--every", 2, "--smoothing", 0
    )
    assert result.exit_code == 0 and "7 frames, 4 of them segmented" in result.output, result.output
    assert len(drawn) == 7 and all(drawn[i][1] is drawn[i + 1][1] for i in (0, 2, 4))
    assert all(np.abs(mean - COLOURS[i % 3]).max() < 8 for i, (mean, _) in enumerate(drawn))  # in the order of time


def test_each_video_that_a_pattern_matches_has_a_result_of_its_name(tmp_path, base_folder):
    """Features of one are not averaged into the next; one that is damaged is told and stops no other."""
    folder, output = tmp_path / "in", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    clip = write_clip(folder / "clip1.mp4", times=[0, 3], sound=None)
    (folder / "clip2.mp4").write_bytes(clip.read_bytes()[:700])
    write_clip(folder / "sub" / "clip3.avi", times=[0, 3], sound=None)
    for name in ("other.mkv", "clip.jpg"):
        (folder / name).touch()
    result = segment_clip(folder / "clip*.mp4", output, base_folder, folder / "**" / "clip*.avi")
    assert result.exit_code == 1 and "clip2.mp4" in result.output and "2 done, 1 failed" in result.output, result.output
    assert result.output.count("2 frames, 2 of them segmented") == 2
    assert sorted(str(path.relative_to(output)) for path in output.rglob("*.*")) == ["clip1.mp4", "sub/clip3.mp4"]
    assert len(read_clip(output / "sub" / "clip3.mp4")[0]) == 2
    # as images: one may go to a folder too
    assert segment_clip(clip, tmp_path / "one", base_folder).exit_code == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["clip1.mp4"]


@pytest.mark.parametrize("size", [(66, 50), (64, 48)])
def test_what_is_painted_is_what_is_written(tmp_path, size):
    """Odd sides are completed by the last line, so that no pixel moves."""
    clip, output = write_clip(tmp_path / "clip.mp4", size), tmp_path / "out.mkv"
    odd = (size[0] - 1, size[1] - 3)
    rng = np.random.default_rng(0)
    block = np.kron(rng.integers(30, 220, (9, 9)), np.ones((8, 8)))[: odd[1], : odd[0]].astype(np.uint8)
    picture = Image.fromarray(block).convert("RGB")
    with VideoReader(clip) as reader:
        assert (reader.frames, reader.seconds) == (len(TIMES), pytest.approx(1, abs=0.1))
        assert repaint_video(reader, output, lambda image: picture) == []
    frames, _, _ = read_clip(output)
    for _, written in frames:
        assert written.size == tuple(side + side % 2 for side in odd)
        assert np.abs(np.asarray(written, int)[: odd[1], : odd[0]] - np.asarray(picture, int)).mean() < 4


def test_sound_that_the_new_file_cannot_hold_is_encoded_again(tmp_path, base_folder):
    clip = write_clip(tmp_path / "clip.mkv", sound="pcm_s16le")
    result = segment_clip(clip, tmp_path / "out.mp4", base_folder)
    assert result.exit_code == 0 and "pcm_s16le" in result.output, result.output
    with av.open(str(tmp_path / "out.mp4")) as written:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in written.decode(audio=0)])
    assert 15000 < heard.size < 19000 and np.abs(heard).max() > 0.1


def test_a_clip_that_phones_turn_is_upright(tmp_path, base_folder, monkeypatch):
    from spar_hf.batch import video_files

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8))

    class Turned:
        rotation = 90

        def to_image(self):
            return image

    turned = np.asarray(video_files.upright(Turned()))
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image)))  # FFmpeg's angle is counter-clockwise


@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(4, 3), (88, 50)), (Fraction(1, 2), (66, 100)), (None, (66, 50))]
)
def test_pixels_that_are_not_square_become_so(tmp_path, aspect, size):
    """As a player shows them; the new file says nothing of their shape."""
    clip, output, seen = write_clip(tmp_path / "clip.mp4", aspect=aspect), tmp_path / "out.mp4", []
    with VideoReader(clip) as reader:
        repaint_video(reader, output, lambda picture: seen.append(picture.size) or picture)
    with VideoReader(output) as made:
        assert {*seen} == {size} and (made.video.width, made.video.height) == size and made.aspect == 1


def test_a_damaged_clip_or_a_stop_leaves_the_former_result(tmp_path, base_folder):
    output = tmp_path / "out.mp4"
    output.write_bytes(b"former")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(write_clip(tmp_path / "clip.mp4").read_bytes()[:700])
    result = segment_clip(broken, output, base_folder)
    assert result.exit_code == 1 and "broken.mp4" in result.output and result.output.count("\n") == 1, result.output
    with VideoReader(tmp_path / "clip.mp4") as reader:

        def stop(image):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            repaint_video(reader, output, stop)
    assert output.read_bytes() == b"former"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.mp4", "clip.mp4", "out.mp4"]


def test_wrong_use_is_refused_before_a_model_is_loaded(tmp_path):
    clip, picture = write_clip(tmp_path / "clip.mp4", times=[0], sound=None), tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(picture)
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as out:
        heard = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        out.mux(heard.encode(frame))
        out.mux(heard.encode(None))
    out = tmp_path / "out.mp4"
    for images, output, more, status, word in (
        ([clip, picture], tmp_path / "folder", [], 2, "a.png is no video"),
        ([clip, sound], out, [], 2, "results of 2 videos need a folder"),
        ([clip, tmp_path / "other/clip.mp4"], tmp_path / "folder", [], 2, "would both be written"),
        ([tmp_path / "cl*.mp4"], tmp_path, [], 2, "both input and output"),
        ([clip], tmp_path, [], 2, "is the input"),
        ([tmp_path / "none*.mp4"], out, [], 1, "No video matches"),
        ([clip], tmp_path / "out.tar", [], 2, "shards are for images"),
        ([clip], tmp_path / "out.png", [], 2, ".mp4"),
        ([clip], clip, [], 2, "is the input"),
        ([clip], out, ["--tile", "64"], 2, "--tile"),
        ([clip], out, ["--format", "json"], 2, "--format"),
        ([clip], out, ["--smoothing", "1"], 2, "smoothing"),
        ([clip], out, ["--every", "0"], 2, "every"),
        ([clip], out, ["--max-pixels", "100"], 2, "--max-pixels"),
        ([clip], out, ["--batch-size", "8", "--workers", "2"], 2, "Leave out --workers, --batch-size"),
        ([clip], out, ["--shard-range", "0:2"], 2, "Leave out --shard-range:"),
        ([tmp_path], out, [], 2, "is a folder, of which no one video is made"),
        ([picture], out, [], 2, "a.png is a still image and no video"),
        ([picture], tmp_path / "masks.png", ["--every", "2"], 2, "--every"),
        ([picture], tmp_path / "masks.png", ["--smoothing", "0"], 2, "--smoothing"),
        ([tmp_path / "none.mp4"], out, [], 1, "none.mp4"),
        ([sound], out, [], 1, "no pictures"),
    ):
        words = ["--labels", "road; sky", "--output", str(output)]
        result = CliRunner().invoke(app, ["segment", *map(str, images), *words, *more])
        assert result.exit_code == status and word in result.output, (more, result.output)
    assert not out.exists() and not (tmp_path / "folder").exists()


@pytest.mark.parametrize("kind", ["gif", "png"])
def test_an_animation_becomes_a_video(tmp_path, base_folder, kind):
    frames = [Image.new("RGB", (64, 48), colour) for colour in COLOURS]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], duration=100)
    result = segment_clip(tmp_path / f"a.{kind}", tmp_path / "out.mp4", base_folder)
    assert result.exit_code == 0 and "3 frames, 3 of them segmented" in result.output, result.output


def test_a_legend_has_the_colours_of_the_masks():
    strip = np.asarray(legend_strip(200, list(zip(["road", "sky"], palette(2), strict=True))))
    assert strip.shape[1] == 200
    for colour in palette(2):
        assert (strip == colour).all(-1).sum() > 50


def test_the_default_weight_of_the_past_is_that_of_python():
    assert FrameAverage().smoothing == SMOOTHING
