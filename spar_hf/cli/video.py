"""`spar-hf segment clip.mp4`: videos with masks over their frames."""

import glob
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from spar_hf.cli.reporting import exit_on_error, finish, say, work_bar
from spar_hf.cli.result_paths import FILE_SUFFIXES
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import (
    DISK_ERRORS,
    RunSummary,
    check_distinct_targets,
    check_output_differs,
    inside_folder,
)
from spar_hf.utils.image_listing import files_matching, split_pattern

if TYPE_CHECKING:
    from spar_hf.cli.segment_options import SegmentOptions

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
SMOOTHING = 0.6  # that of `FrameAverage`, which imports torch
LEGEND_CLASSES = 24  # a legend of more hides the video
NOT_FOR_VIDEOS = (
    *("keep_background", "presence", "min_presence", "heatmap", "map_output", "frames", "tile", "tile_overlap"),
    *("image_range", "max_pixels", "workers"),
)


def is_video(source: str | Path) -> bool:
    """
    Whether a file, or what a pattern matches, is named like a video.

    Example:

    ```python
    >>> is_video("in/Clip.MP4"), is_video("in/clip*.mp4"), is_video("in/street.jpg")
    (True, True, False)
    ```"""
    return Path(source).suffix.lower() in VIDEO_SUFFIXES


def check_video_options(options: "SegmentOptions") -> None:
    """
    Refuse what does not go with a video.

    Raises:
        UsageError: images among the videos, a folder or a still image, shards, or an option for images.
    """
    others = [argument for argument in options.images if not is_video(argument)]
    if others and len(options.images) > 1:  # one alone may be an animation that becomes a video
        raise UsageError(f"{others[0]} is no video by its ending. Segment videos and images in runs of their own.")
    for argument in others:
        check_moving(argument)
    if options.to_shards:
        raise UsageError(f"--output {options.output}: shards are for images; videos go to a folder.")
    names = {"map_output": "--map"}
    given = [names.get(name, f"--{name.replace('_', '-')}") for name in NOT_FOR_VIDEOS if getattr(options, name)]
    given += ["--format"] if options.chosen_formats != "overlay" else []
    given += ["--batch-size"] if options.is_changed("batch_size") else []
    given += [options.job.option] if options.job.is_part else ["--skip-existing"] if options.skip_existing else []
    if given:
        raise UsageError(f"Leave out {', '.join(given)}: the result of a video is a video with masks over it.")


def check_moving(argument: str) -> None:
    """
    Refuse what FFmpeg would not open, and a still image, which it would take for a video of one frame.

    Raises:
        UsageError: a folder, or an image without further frames.
    """
    if Path(argument).is_dir():
        raise UsageError(
            f"{argument} is a folder, of which no one video is made. For masks of its images name a folder as --output; for "
            f'its videos write "{argument}/*.mp4".'
        )
    from PIL import Image

    from spar_hf.model.image_input import has_more_frames

    try:
        with Image.open(argument) as image:
            moves = has_more_frames(image) and image.format != "TIFF"  # its frames are pages
    except (OSError, Image.DecompressionBombError):  # no image, which may be a video of another ending
        return
    if not moves:
        raise UsageError(f"{argument} is a still image and no video. Name a picture as --output, such as masks.png.")


def find_videos(arguments: Sequence[str], exclude: Path | None = None) -> list[tuple[Path, PurePosixPath]]:
    """
    The videos of all arguments, each once, and their paths below an output folder: with the sub-folders of a pattern.

    Args:
        arguments: files, also such that do not exist, and patterns.
        exclude: a folder to skip, resolved.

    Raises:
        FileNotFoundError: a pattern that matches no video.
        UsageError: the folder of a pattern is `exclude` itself.
    """
    found: dict[Path, tuple[Path, PurePosixPath]] = {}
    for argument in arguments:
        if Path(argument).exists() or not glob.has_magic(argument):
            root, videos = Path(argument).parent, [Path(argument)]
        else:
            root = split_pattern(argument)[0]
            check_output_differs(root, exclude)
            videos, _ = files_matching(argument, exclude, is_video)
            if not videos:
                raise FileNotFoundError(f"No video matches {argument!r}.")
        for video in videos:
            found.setdefault(video.resolve(), (video, inside_folder(PurePosixPath(video.relative_to(root).as_posix()))))
    return list(found.values())


def plan_videos(options: "SegmentOptions") -> list[tuple[Path, Path]]:
    """
    Each video and the file to write: `--output`, or one of the same name in the folder that it names.

    Raises:
        UsageError: a file for several videos, one that is no video, two results of one name, or a result that is an input.
        FileNotFoundError: a pattern that matches no video.
    """
    from spar_hf.batch.video_files import VIDEO_OUTPUTS, check_video_output

    output = options.path
    one = len(options.images) == 1 and not glob.has_magic(options.images[0])
    names_file = not output.is_dir() and (
        output.is_file() or output.suffix.lower() in (*VIDEO_SUFFIXES, *FILE_SUFFIXES) or (one and output.suffix != "")
    )
    videos = find_videos(options.images, None if names_file else output.resolve())
    if names_file and len(videos) > 1:
        raise UsageError(f"--output {output} names a file, but results of {len(videos)} videos need a folder.")
    if names_file:
        check_video_output(output)
        work = [(videos[0][0], output)]
    else:
        suffixes = [name.suffix if name.suffix.lower() in VIDEO_OUTPUTS else ".mp4" for _, name in videos]
        pairs = zip(videos, suffixes, strict=True)
        work = [(video, output / name.with_suffix(suffix)) for (video, name), suffix in pairs]
        check_distinct_targets((target, str(video)) for video, target in work)
    there = [video for video, _ in work if video.exists()]
    for _, target in work:
        if target.exists() and any(map(target.samefile, there)):
            raise UsageError(f"The result {target} is the input. Name another --output.")
    return work


def refuse_video_options(options: "SegmentOptions") -> None:
    """
    Raises:
        UsageError: an option for videos is given with images.
    """
    if options.is_changed("every") or options.is_changed("smoothing"):
        raise UsageError("--every and --smoothing are for a video, such as clip.mp4; leave them out for images.")


def segment_video(options: "SegmentOptions") -> NoReturn:
    """
    Write each video with masks over it, with a progress bar, print what was found, and exit. Of several, a damaged one stops
    no other.
    """
    from PIL import Image

    from spar_hf.batch.video_files import VideoReader
    from spar_hf.cli.pipelines import load_pipeline
    from spar_hf.utils.labels import parse_background, read_labels, single_class_hint

    with exit_on_error(usage=(UsageError, ImportError), failure=(ValueError, OSError)):
        check_video_options(options)
        vocabulary = read_labels(options.labels)
        work = plan_videos(options)
        if len(work) == 1:
            VideoReader(work[0][0]).container.close()  # a bad file is reported before the model is loaded
    with exit_on_error():
        pipe = load_pipeline(options.model, options.device, support=options.support)
    with exit_on_error(failure=()):  # and wrong words or options before the first frame
        rules = options.rules(parse_background(options.background, vocabulary, options.has_rules))
        FramePainter(pipe, vocabulary, rules, options).segment(pipe.encode(Image.new("RGB", (32, 32))))
    if hint := single_class_hint(options.labels, vocabulary):
        say(f"note: {hint}", err=True)
    summary, start = RunSummary(), time.perf_counter()
    for video, target in work:
        try:
            paint_video(video, target, FramePainter(pipe, vocabulary, rules, options))
            summary.done += 1
        except typer.Exit as stop:  # its error is printed
            if len(work) == 1 or stop.exit_code != 1 or getattr(stop.__context__, "errno", None) in DISK_ERRORS:
                raise
            summary.failed.append((str(video), ""))
    summary.seconds = time.perf_counter() - start
    finish(summary, str(summary) if len(work) > 1 else None)


def paint_video(video: Path, target: Path, painter: "FramePainter") -> None:
    """
    Write one video with masks over it, and print what was found.

    Raises:
        typer.Exit: status 1 after a line about a damaged video or a full disk; that of the signal if one stopped it.
    """
    from spar_hf.batch.video_files import VideoReader, repaint_video
    from spar_hf.cli.segment import show_counts

    with (
        exit_on_error(usage=(UsageError, ImportError), failure=(ValueError, OSError, RuntimeError)),
        VideoReader(video) as reader,
        work_bar("frame", "video", reader.frames) as bar,
    ):
        notes = repaint_video(reader, target, painter, bar.update)
    for note in notes:
        say(f"note: {note}", err=True)
    show_counts(painter.labels, painter.pixels, painter.scores, painter.background)
    say(f"{painter.seen} frames, {painter.chosen} of them segmented, {painter.average.cuts} scene cuts")
    say(f"written: {target}")


class FramePainter:
    """
    Draws masks over the frames of a video, each frame in its turn.

    Args:
        pipe: the pipeline.
        vocabulary: the classes.
        rules: how the pipeline finds them, see [`SegmentOptions.rules`].
        options: of the command.

    Attributes:
        labels, background: of the results.
        pixels, scores: of each class: pixels of all segmented frames, and the mean score over them.
        seen, chosen: number of frames so far, and of those that were segmented.
    """

    def __init__(self, pipe: Any, vocabulary: Any, rules: dict[str, Any], options: "SegmentOptions"):
        from spar_hf.cli.pipelines import encoding_options
        from spar_hf.model.video import FrameAverage

        given = {name: value for name, value in rules.items() if value is not None}
        self.reading = encoding_options(given)
        self.pipe, self.given = pipe, {**given, "candidate_labels": vocabulary, "output": "map"}
        self.average = FrameAverage(options.smoothing)
        self.every, self.seen, self.chosen = options.every, 0, 0
        self.labels: Sequence[str] = []
        self.background = -1
        self.pixels: Any = 0
        self._sums: Any = 0
        self._found: dict[str, Any] = {}
        self._legend: Any = None

    def segment(self, encoded: Any) -> dict[str, Any]:
        """The pipeline's `output="map"` of an encoded frame."""
        return self.pipe(encoded, **self.given)

    def __call__(self, frame: Any) -> Any:
        """The frame with its masks; one that is not segmented gets those of the last one that was."""
        import numpy as np

        from spar_hf.cli.overlays import legend_strip, overlay, palette, put_below

        if self.seen % self.every == 0:
            self._found = self.segment(self.average(self.pipe.encode(frame, **self.reading)))
            self.labels, self.background = self._found["labels"], self._found["background"]
            pixels = np.bincount(self._found["map"].ravel(), minlength=len(self.labels))
            self.pixels = self.pixels + pixels
            self._sums = self._sums + pixels * np.nan_to_num(np.asarray(self._found["scores"], float))
            self.chosen += 1
        self.seen += 1
        picture = overlay(frame, self._found["map"], self.labels, legend=False, background=self.background)
        if len(self.labels) > LEGEND_CLASSES:
            return picture
        if self._legend is None:
            colours = palette(len(self.labels), self.background)
            self._legend = legend_strip(frame.width, list(zip(self.labels, colours, strict=True)))
        return put_below(picture, self._legend)

    @property
    def scores(self) -> list[float]:
        import numpy as np

        return (self._sums / np.maximum(self.pixels, 1)).tolist()
