"""Short video files for tests."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image

COLOURS = [(40, 90, 200), (60, 160, 70), (200, 120, 40)]
TIMES = [0, 3, 6, 12, 15, 24, 27]  # of frames, in thirtieths of a second


def write_clip(path, size=(66, 50), times=TIMES, sound="aac", aspect=None):
    """A clip of plain colours, and a sound of a second. `aspect`: width of a stored pixel over its height."""
    with av.open(str(path), "w") as out:
        pictures = out.add_stream("libx264", rate=30)
        pictures.width, pictures.height, pictures.pix_fmt = *size, "yuv420p"
        pictures.codec_context.time_base = Fraction(1, 30)
        if aspect is not None:
            pictures.codec_context.sample_aspect_ratio = aspect
        if sound:
            heard = out.add_stream(sound, rate=16000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_image(Image.new("RGB", size, COLOURS[number % 3]))
            frame.pts, frame.time_base = time, Fraction(1, 30)
            out.mux(pictures.encode(frame))
        out.mux(pictures.encode(None))
        if sound:
            kind = heard.codec_context.format.name
            wave = np.sin(np.arange(16000) / 6)
            for start in range(0, 16000, 800):
                part = wave[None, start : start + 800]
                values = part.astype(np.float32) if kind == "fltp" else (part * 2**14).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(values, format=kind, layout="mono")
                frame.rate, frame.pts = 16000, start
                out.mux(heard.encode(frame))
            out.mux(heard.encode(None))
    return path
