"""Video files: each frame is drawn over and written again, with the sound and the time of the original."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar_hf.utils.atomic import write_atomically
from spar_hf.utils.errors import UsageError

# what the encoder of H.264 goes into
VIDEO_OUTPUTS = (".mp4", ".mov", ".mkv")
# kinds of sound that players find in any of them
COPIED_SOUND = ("aac", "mp3", "ac3", "eac3", "alac", "flac", "opus")


def import_av() -> Any:
    """
    Import PyAV.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("Videos need PyAV: pip install 'spar-hf[video]'.") from error
    return av


class VideoReader:
    """
    A video file whose frames are read one after the other.

    Args:
        path: file in a format that FFmpeg reads.

    Attributes:
        frames: estimated number of frames; `None` if the file does not say.
        seconds: duration in seconds; `None` if the file does not say.
        aspect: width of a stored pixel over its height; recordings of tape have others than 1.

    Raises:
        ValueError: the file is no video, or damaged.
        ImportError: PyAV is not installed.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path):
        av = import_av()
        self.path, self._error = path, av.error.FFmpegError
        try:
            self.container = av.open(str(path))
        except OSError as error:  # no such file, no right to read it
            raise OSError(error.errno, error.strerror, str(path)) from error
        except self._error as error:
            raise ValueError(f"{path} is no video that FFmpeg reads, or damaged: {error.strerror}.") from error
        if not self.container.streams.video:
            self.container.close()
            raise ValueError(f"{path} has no pictures.")
        self.video = self.container.streams.video[0]
        self.video.thread_type = "AUTO"
        self.rate = self.video.average_rate or self.video.guessed_rate
        self.seconds = self.container.duration / av.time_base if self.container.duration else None
        self.aspect = float(self.video.sample_aspect_ratio or 1)
        self.frames = self.video.frames or None
        if self.frames is None and self.seconds and self.rate:
            self.frames = round(self.seconds * self.rate)

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.container.close()

    def packets(self) -> Any:
        """
        The packets of pictures and sound in the order of the file, of pictures as lists of frames.

        Returns:
            An iterator over pairs: a list of frames of PyAV and `None`, or `None` and a packet of sound. The last packet of
            a stream of sound is empty.

        Raises:
            ValueError: the file is damaged.
        """
        streams, count = [self.video, *self.container.streams.audio], 0
        try:
            for packet in self.container.demux(streams):
                if packet.stream is self.video:
                    frames = packet.decode()
                    count += len(frames)
                    yield frames, None
                else:
                    yield None, packet
        except self._error as error:
            raise ValueError(f"{self.path} is damaged after frame {count}: {error.strerror}.") from error


def upright(frame: Any, aspect: float = 1) -> Image.Image:
    """
    The picture of a frame of PyAV in RGB, as it is to be shown: with square pixels, the shorter side of the stored ones made
    longer, and turned as phones say.
    """
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    image = frame.to_image()
    if aspect != 1:
        size = round(image.width * max(aspect, 1)), round(image.height / min(aspect, 1))
        image = image.resize(size, Image.Resampling.BICUBIC)
    turn = turns.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)


def check_video_output(output: Path) -> None:
    """
    Raises:
        UsageError: the file has another suffix, or is a folder.
    """
    if output.suffix.lower() not in VIDEO_OUTPUTS or output.is_dir():
        suffixes = f"{', '.join(VIDEO_OUTPUTS[:-1])} or {VIDEO_OUTPUTS[-1]}"
        raise UsageError(f"--output {output} must be a file that ends in {suffixes}.")


def repaint_video(
    source: VideoReader,
    output: Path,
    paint: Callable[[Image.Image], Image.Image],
    progress: Callable[[], object] | None = None,
) -> list[str]:
    """
    Write a video whose pictures are made from those of another one, in the memory of a few frames. Every picture is shown
    as long as its original. Sound is copied, or encoded as AAC where few players find it in the new file.

    Args:
        source: the video to read.
        output: `.mp4`, `.mov` or `.mkv`, written as H.264 under a temporary name and renamed at the end.
        paint: makes a picture from an upright one in RGB; all of them of one size.
        progress: called after each frame.

    Returns:
        Notes on what was changed beside the pictures.

    Raises:
        UsageError: as [`check_video_output`].
        ValueError: the source is damaged, or has no frames.
        OSError: the disk is full or read-only.
    """
    check_video_output(output)
    notes: list[str] = []

    def write(temporary: Path) -> None:
        with import_av().open(str(temporary), "w") as target:
            pictures = _Pictures(target, source)
            sounds = {stream.index: _Sound(target, stream, notes) for stream in source.container.streams.audio}
            early = []  # a file is begun when the size of its pictures is known
            for frames, packet in source.packets():
                if packet is not None:
                    early.append(packet)
                for frame in frames or ():
                    pictures.add(paint(upright(frame, source.aspect)), frame)
                    if progress is not None:
                        progress()
                while early and pictures.count:
                    part = early.pop(0)
                    sounds[part.stream.index].add(part)
            if not pictures.count:
                raise ValueError(f"{source.path} has no frames.")
            pictures.end()
            for sound in sounds.values():
                sound.end()

    try:
        write_atomically(output, write)
    except import_av().error.FFmpegError as error:
        raise OSError(error.errno, f"FFmpeg cannot write the video: {error.strerror}", str(output)) from error
    return notes


class _Pictures:
    """The stream of pictures of a new file. Sides become even, which H.264 asks for, by repeating the last line."""

    def __init__(self, target: Any, source: VideoReader):
        self.target, self.count = target, 0
        self.last: int | None = None
        self.stream = target.add_stream("libx264", rate=source.rate or 25, options={"crf": "20", "preset": "fast"})
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.time_base = source.video.time_base
        self.size: tuple[int, int] | None = None

    def add(self, picture: Image.Image, original: Any) -> None:
        if self.size is None:
            self.size = picture.size
            self.stream.width, self.stream.height = (side + side % 2 for side in picture.size)
        if picture.size != self.size:
            raise ValueError(f"Picture {self.count} is of another size: {picture.size} instead of {self.size}.")
        frame = import_av().VideoFrame.from_image(_even(picture))
        frame.pts, frame.time_base = original.pts, original.time_base
        if frame.pts is None or (self.last is not None and frame.pts <= self.last):  # raw streams have no times
            step = max(1, round(1 / (self.stream.average_rate * frame.time_base)))
            frame.pts = 0 if self.last is None else self.last + step
        self.last = frame.pts
        self.target.mux(self.stream.encode(frame))
        self.count += 1

    def end(self) -> None:
        self.target.mux(self.stream.encode(None))


class _Sound:
    """A stream of sound of a new file."""

    def __init__(self, target: Any, source: Any, notes: list[str]):
        self.target, self.source = target, source
        name = source.codec_context.name
        self.copied = name in COPIED_SOUND and name in target.supported_codecs
        if self.copied:
            self.stream = target.add_stream_from_template(source)
        else:
            self.stream = target.add_stream("aac", rate=source.rate)
            notes.append(f"the sound ({name}) was encoded again as AAC")

    def add(self, packet: Any) -> None:
        if self.copied:
            if packet.dts is not None:  # not the empty packet at the end
                packet.stream = self.stream
                self.target.mux(packet)
            return
        for frame in packet.decode():
            self.target.mux(self.stream.encode(frame))

    def end(self) -> None:
        if not self.copied:
            self.target.mux(self.stream.encode(None))


def _even(picture: Image.Image) -> Image.Image:
    """The picture with its last column and row repeated where a side is odd."""
    if picture.width % 2 == picture.height % 2 == 0:
        return picture
    missing = ((0, picture.height % 2), (0, picture.width % 2), (0, 0))
    return Image.fromarray(np.pad(np.asarray(picture), missing, mode="edge"))
