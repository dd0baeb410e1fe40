"""`spar-hf app`: a page to drop an image on, type words and see masks, one pass beside the sliding window."""

import html
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar_hf.cli.commands import load_pipeline, read_words, timed, untouched
from spar_hf.cli.visualization import overlay, palette
from spar_hf.model.image_input import read_image, to_rgb

DISPLAY_EDGE = 1280  # longer side in pixels of the pictures that go to the page; masks are made in the image's size
MAX_UPLOAD = "200mb"
WORDS = "sky; building; tree, vegetation; road, pavement; person; car"
STYLE = """
.spar-legend { width: 100%; border: 0 !important; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.spar-legend tr { border: 0 !important; }
.spar-legend td, .spar-legend th {
  padding: .3rem .6rem; border: 0; border-bottom: 1px solid var(--border-color-primary); text-align: right; }
.spar-legend td:first-child, .spar-legend th:first-child { text-align: left; }
.spar-legend .swatch {
  display: inline-block; width: .9em; height: .9em; margin-right: .5em; border-radius: 3px; vertical-align: -.08em; }
.spar-legend .absent { opacity: .5; }
.spar-legend .bar { display: inline-block; width: 5em; height: .5em; margin-left: .5em; border-radius: 3px;
  overflow: hidden; background: var(--border-color-primary); text-align: left; }
.spar-legend .bar span { display: block; height: 100%; background: var(--color-accent); }
.spar-note { opacity: .7; font-size: .9em; }
.spar-error { padding: .7rem 1rem; border-left: 4px solid #c2410c; border-radius: 4px; background: #c2410c1a; }
"""


def import_gradio():
    """
    Gradio, told to call nobody.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"  # read once, at its import
    try:
        import gradio
    except ImportError as error:
        raise ImportError("The page needs Gradio: pip install 'spar-hf[app]'.") from error
    return gradio


def legend(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """
    A table in HTML: a row per class with its colour and, for every way, its share of the image and its probability.

    Args:
        results (`Sequence[tuple[str, dict]]`): name of the way and its result, from [`timed`].
    """
    labels = max((result["labels"] for _, result in results), key=len)
    colours = palette(len(labels))
    head = "".join(f"<th>{html.escape(way)}: share</th><th>probability</th>" for way, _ in results)
    shares = [np.bincount(result["map"].ravel(), minlength=len(labels)) / result["map"].size for _, result in results]
    rows = []
    for i in sorted(range(len(labels)), key=lambda i: -shares[0][i]):
        cells = ""
        for (_, result), share in zip(results, shares, strict=True):
            score = result["scores"][i] if share[i] else 0
            bar = f'<span class="bar"><span style="width: {score:.0%}"></span></span>'
            cells += f"<td>{share[i]:.1%}</td><td>{score:.2f}{bar}</td>" if share[i] else "<td>–</td><td>–</td>"
        kind = "" if any(share[i] for share in shares) else ' class="absent"'
        swatch = f'<span class="swatch" style="background: rgb{tuple(int(c) for c in colours[i])}"></span>'
        rows.append(f"<tr{kind}><td>{swatch}{html.escape(labels[i])}</td>{cells}</tr>")
    return (
        f'<table class="spar-legend"><thead><tr><th>class</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        '<p class="spar-note">Share: of the image’s pixels. Probability: its mean over the pixels of the class.</p>'
    )


def picture(image: Image.Image, result: dict[str, Any]) -> Image.Image:
    """The image under its masks, reduced to what a page shows."""
    label_map = result["map"]
    scale = DISPLAY_EDGE / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
        label_map = np.asarray(Image.fromarray(label_map.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    return overlay(image, label_map, result["labels"], legend=False)


def time_line(result: dict[str, Any], first: dict[str, Any] | None = None) -> str:
    """Times of a way in words, beside those of the first."""
    ratio = "" if first is None else f", {result['forward_seconds'] / first['forward_seconds']:.1f} × one pass"
    return f"**{result['forward_seconds']:.2f} s** vision forward{ratio} · {result['seconds']:.2f} s in all"


def build(model: str | None = None, base: str | None = None, device: str | None = None, stride: int = 24):
    """
    The page.

    Args:
        model (`str`, *optional*): a two-tower SPAR folder or hub id; the embedded one by default.
        base (`str`, *optional*): what the sliding window runs; the embedded base for the embedded model, else `model`.
        device (`str`, *optional*): where both run.
        stride (`int`, *optional*, defaults to 24): first value of the window's step in pixels.

    Returns:
        `gradio.Blocks`, to be launched by [`launch`].

    Raises:
        ImportError: Gradio is not installed.
        ValueError, OSError: see [`load_pipeline`].
    """
    gr = import_gradio()
    one_pass = load_pipeline(model, device)
    timed(one_pass, Image.new("RGB", (64, 64)), ["image"])  # warm-up: the first image's time is not that of loading
    sliding: list[Any] = []  # loaded when first asked for

    def run(
        path: str | None,
        words: str,
        shortest_edge: int,
        threshold: float,
        compare: bool,
        stride: int,
        progress=gr.Progress(),  # noqa: B008 - Gradio finds it by its default
    ) -> Iterator[dict[Any, Any]]:
        """One pass at once, and then the sliding window where it is asked for."""
        try:
            vocabulary = read_words(words)
            if path is None:
                raise ValueError("There is no image yet. Drop one on the left, or click there to choose a file.")
            image = to_rgb(read_image(path))
            options = {"size": {"shortest_edge": int(shortest_edge)}, "threshold": float(threshold)}
            progress(0, desc="one pass")
            first = timed(one_pass, image, vocabulary, **options)
            shown: dict[Any, Any] = {
                first_picture: picture(image, first),
                first_time: time_line(first),
                note: gr.HTML(visible=False),
                table: legend([("one pass", first)]),
                second: gr.Column(visible=bool(compare)),
                second_picture: None,
                second_time: "",
            }
            yield shown
            if not compare:
                return
            if not sliding:
                sliding.append(load_pipeline(base or untouched(model), device, stride=int(stride)))
            vision = sliding[0].model.vision_model
            vision.stride = int(stride)
            vision.progress = lambda done, total: progress((done, total), desc="sliding window", unit="windows")
            other = timed(sliding[0], image, vocabulary, **options)
        except (ValueError, OSError, RuntimeError) as error:
            # in the page: Gradio's own way covers every result with a red sign. Nobody knows the upload's place here
            text = str(error).replace(path, Path(path).name) if path else str(error)
            yield {note: gr.HTML(f'<p class="spar-error" role="alert">{html.escape(text)}</p>', visible=True)}
            return
        yield {
            second_picture: picture(image, other),
            second_time: time_line(other, first),
            table: legend([("one pass", first), ("sliding window", other)]),
        }

    edge = (one_pass.image_processor.size or {}).get("shortest_edge") or 672
    window = one_pass.model.config.image_size
    name = Path(one_pass.model.name_or_path).name
    # uploads are looked for once an hour and deleted after a day
    with gr.Blocks(title="SPAR: masks from words", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(
            f"# Masks from words in one pass\nSPAR with `{name}`. Everything runs on the computer that serves this page."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                image_in = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=280)
                # Gradio would open the file itself, and fail on a damaged one before there is anybody to say so
                image_in.preprocess = lambda upload: None if upload is None else upload.path
                words_in = gr.Textbox(
                    WORDS,
                    label="Words",
                    lines=3,
                    info="“;” between classes, “,” between names of one; or ade20k, voc21, …",
                )
                edge_in = gr.Slider(
                    64, max(1024, edge), edge, step=16, label="Working resolution", info="Shorter side in pixels."
                )
                threshold_in = gr.Slider(
                    0,
                    1,
                    0,
                    step=0.01,
                    label="Background threshold",
                    info="Pixels whose best probability is below it become background.",
                )
                compare_in = gr.Checkbox(False, label="Compare with the sliding window (slow)")
                stride_in = gr.Slider(
                    8, window, stride, step=8, label="Stride of the window", info="In pixels.", visible=False
                )
                button = gr.Button("Segment", variant="primary")
            with gr.Column(scale=2, min_width=480):
                note = gr.HTML(visible=False, padding=False)
                with gr.Row():
                    with gr.Column(min_width=240):
                        first_picture = gr.Image(
                            label="One pass", interactive=False, buttons=["download", "fullscreen"]
                        )
                        first_time = gr.Markdown()
                    with gr.Column(min_width=240, visible=False) as second:
                        second_picture = gr.Image(
                            label="Sliding window", interactive=False, buttons=["download", "fullscreen"]
                        )
                        second_time = gr.Markdown()
                table = gr.HTML(padding=False)
        compare_in.change(lambda on: gr.Slider(visible=on), compare_in, stride_in, show_progress="hidden")
        gr.on(
            [button.click, words_in.submit],
            run,
            [image_in, words_in, edge_in, threshold_in, compare_in, stride_in],
            [note, first_picture, first_time, second, second_picture, second_time, table],
        )
    return page


def launch(
    page,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    wait: bool = True,
) -> str:
    """
    Serve the page; no font, script or message comes from or goes to another computer.

    Args:
        page (`gradio.Blocks`): from [`build`].
        host (`str`, *optional*, defaults to `"127.0.0.1"`): `"0.0.0.0"` serves the network.
        port (`int`, *optional*): the first free one from 7860 on by default.
        open_browser (`bool`, *optional*, defaults to `False`): whether to open the page.
        wait (`bool`, *optional*, defaults to `True`): whether to serve until the process is stopped.

    Returns:
        Address of the page.

    Raises:
        OSError: the port is taken.
    """
    gr = import_gradio()
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        prevent_thread_lock=not wait,
        quiet=not wait,
        share=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=MAX_UPLOAD,
        css=STYLE,
        # named fonts of the system: Gradio's own themes load theirs from elsewhere
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    return address
