"""`spar-hf segment clip.mp4`: a video with masks over its frames."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from spar_hf.cli.reporting import exit_on_error, say, work_bar
from spar_hf.utils.errors import UsageError

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
    Whether a file is named like a video.

    Example:

    ```python
    >>> is_video("in/Clip.MP4"), is_video("in/street.jpg")
    (True, False)
    ```"""
    return Path(source).suffix.lower() in VIDEO_SUFFIXES


def check_video_options(options: "SegmentOptions") -> None:
    """
    Refuse what does not go with a video.

    Raises:
        UsageError: several inputs, an output that is no video, or an option for images.
    """
    from spar_hf.batch.video_files import check_video_output

    if len(options.images) != 1:
        raise UsageError(f"A video is segmented by itself, not with others: name one input, not {len(options.images)}.")
    check_video_output(options.path)
    names = {"map_output": "--map"}
    given = [names.get(name, f"--{name.replace('_', '-')}") for name in NOT_FOR_VIDEOS if getattr(options, name)]
    given += ["--format"] if options.chosen_formats != "overlay" else []
    given += ["--batch-size"] if options.is_changed("batch_size") else []
    given += [options.job.option] if options.job.is_part else ["--skip-existing"] if options.skip_existing else []
    if given:
        raise UsageError(f"Leave out {', '.join(given)}: the result of a video is a video with masks over it.")
    source = Path(options.images[0])
    if source.exists() and options.path.exists() and source.samefile(options.path):
        raise UsageError(f"--output {options.path} is the input.")


def refuse_video_options(options: "SegmentOptions") -> None:
    """
    Raises:
        UsageError: an option for videos is given with images.
    """
    if options.is_changed("every") or options.is_changed("smoothing"):
        raise UsageError("--every and --smoothing are for a video, such as clip.mp4; leave them out for images.")


def segment_video(options: "SegmentOptions") -> NoReturn:
    """Write the video with masks over it, with a progress bar, print what was found, and exit."""
    from PIL import Image

    from spar_hf.batch.video_files import VideoReader, repaint_video
    from spar_hf.cli.pipelines import load_pipeline
    from spar_hf.cli.segment import show_counts
    from spar_hf.utils.labels import parse_background, read_labels, single_class_hint

    with exit_on_error(usage=(UsageError, ImportError), failure=(ValueError, OSError)):
        check_video_options(options)
        vocabulary = read_labels(options.labels)
        reader = VideoReader(Path(options.images[0]))  # a bad file is reported before the model is loaded
    with reader:
        with exit_on_error():
            pipe = load_pipeline(options.model, options.device, support=options.support)
        with exit_on_error(failure=()):  # and wrong words or options before the first frame
            rules = options.rules(parse_background(options.background, vocabulary, options.has_rules))
            painter = FramePainter(pipe, vocabulary, rules, options)
            painter.segment(pipe.encode(Image.new("RGB", (32, 32))))
        if hint := single_class_hint(options.labels, vocabulary):
            say(f"note: {hint}", err=True)
        with (
            exit_on_error(usage=UsageError, failure=(ValueError, OSError, RuntimeError)),
            work_bar("frame", "video", reader.frames) as bar,
        ):
            notes = repaint_video(reader, options.path, painter, bar.update)
    for note in notes:
        say(f"note: {note}", err=True)
    show_counts(painter.labels, painter.pixels, painter.scores, painter.background)
    say(f"{painter.seen} frames, {painter.chosen} of them segmented, {painter.average.cuts} scene cuts")
    say(f"written: {options.path}")
    raise typer.Exit(0)


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
