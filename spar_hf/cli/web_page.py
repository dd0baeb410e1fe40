"""The web page of `spar-hf app`: drop an image, type words and see masks, of one pass and of the sliding window."""

import html
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar_hf.cli.overlays import overlay, palette
from spar_hf.cli.pipelines import load_pipeline, segment_timed, sliding_window_model
from spar_hf.cli.result_files import presence_by_label
from spar_hf.cli.web_inputs import MAX_UPLOAD, NOT_UPLOADED, alert, read_upload, read_words, upload_folder
from spar_hf.model.background import MEANING_TEMPLATES
from spar_hf.model.prompts import Vocabulary, unknown_names
from spar_hf.model.vocabularies import ANCHOR_WORDS, STUFF_WORDS

DISPLAY_EDGE = 1280  # longer side in pixels of the pictures on the page; masks are computed at the size of the image
# limits on what one visitor can ask of the computer that serves the page, beside those of `web_inputs`
MAX_SECONDS = 300  # for a sliding window
MAX_WAITING = 16  # requests in the queue
NAMES_AT_ONCE = 16  # embedded between two reports of progress
WORDS = "sky; building; tree, vegetation; road, pavement; person; car"
STYLE = """
.spar-legend { width: 100%; border: 0 !important; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.spar-legend tr { border: 0 !important; }
.spar-legend td, .spar-legend th {
  padding: .3rem .6rem; border: 0; border-bottom: 1px solid var(--border-color-primary); text-align: right; }
.spar-legend td:first-child, .spar-legend th:first-child { text-align: left; }
.spar-legend .swatch {
  display: inline-block; width: .9em; height: .9em; margin-right: .5em; border-radius: 3px; vertical-align: -.08em; }
.spar-legend .bar { display: inline-block; width: 5em; height: .5em; margin-left: .5em; border-radius: 3px;
  overflow: hidden; background: var(--border-color-primary); text-align: left; }
.spar-legend .bar span { display: block; height: 100%; background: var(--color-accent); }
.spar-note { opacity: .7; font-size: .9em; }
.spar-error { padding: .7rem 1rem; border-left: 4px solid #c2410c; border-radius: 4px; background: #c2410c1a; }
"""


def import_gradio():
    """
    Import Gradio with its telemetry off.

    Raises:
        ImportError: Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"  # read at import only
    os.environ["GRADIO_TEMP_DIR"] = str(upload_folder())
    try:
        import gradio
    except ImportError as error:
        raise ImportError("The page needs Gradio: pip install 'spar-hf[app]'.") from error
    return gradio


def unknown_note(tokenizer: Any, vocabulary: Vocabulary) -> str:
    """A note in HTML about names whose characters the tokenizer does not know, if any."""
    unknown = unknown_names(tokenizer, vocabulary.all_names)
    text = f"The model does not know the characters of {', '.join(unknown[:5])}, so the masks may be wrong."
    return f'<p class="spar-note">{html.escape(text)}</p>' if unknown else ""


def legend(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """
    An HTML table with a row per class that was found, the background last: colour and, for every method, share of the image,
    mean probability and presence, if computed. Classes that no method found follow in one line.

    Args:
        results: name of each method and its result from [`segment_timed`].
    """
    first = max((result for _, result in results), key=lambda result: len(result["labels"]))
    labels, background = first["labels"], first["background"]
    colours = palette(len(labels), background)
    presences = [presence_by_label(result) if "presence" in result else None for _, result in results]
    head = "".join(
        f"<th>{html.escape(method)}: share</th><th>probability</th>" + ("" if presence is None else "<th>presence</th>")
        for (method, _), presence in zip(results, presences, strict=True)
    )
    shares = [np.bincount(result["map"].ravel(), minlength=len(labels)) / result["map"].size for _, result in results]
    rows, absent = [], []
    for i in sorted(range(len(labels)), key=lambda i: (i == background, -shares[0][i])):
        if not any(share[i] for share in shares):
            seen = "" if not presences[0] else f" (presence {presences[0].get(labels[i], 0):.2f})"
            absent += [] if i == background else [html.escape(labels[i]) + seen]
            continue
        cells = ""
        for (_, result), share, presence in zip(results, shares, presences, strict=True):
            score = result["scores"][i] if share[i] else 0
            bar = f'<span class="bar"><span style="width: {score:.0%}"></span></span>'
            cells += f"<td>{share[i]:.1%}</td><td>{score:.2f}{bar}</td>" if share[i] else "<td>–</td><td>–</td>"
            if presence is not None:
                cells += f"<td>{presence[labels[i]]:.2f}</td>" if labels[i] in presence else "<td>–</td>"
        swatch = f'<span class="swatch" style="background: rgb{tuple(int(c) for c in colours[i])}"></span>'
        rows.append(f"<tr><td>{swatch}{html.escape(labels[i])}</td>{cells}</tr>")
    missing = f'<p class="spar-note">Not found: {", ".join(absent)}.</p>' if absent else ""
    return (
        f'<table class="spar-legend"><thead><tr><th>class</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f'{missing}<p class="spar-note">Share of the image’s pixels; probability averaged over the pixels of the class.</p>'
    )


def picture(image: Image.Image, result: dict[str, Any]) -> Image.Image:
    """Overlay of the masks, reduced to the size that the page shows."""
    label_map = result["map"]
    scale = DISPLAY_EDGE / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
        label_map = np.asarray(Image.fromarray(label_map.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    return overlay(image, label_map, result["labels"], legend=False, background=result["background"])


def time_line(result: dict[str, Any], first: dict[str, Any] | None = None) -> str:
    """Run times of a method as text, and their ratio to those of the first method."""
    ratio = "" if first is None else f", {result['forward_seconds'] / first['forward_seconds']:.1f} × one pass"
    return f"**{result['forward_seconds']:.2f} s** vision forward{ratio} · {result['seconds']:.2f} s in total"


@dataclass
class Controls:
    """The input components of the page."""

    image: Any
    words: Any
    shortest_edge: Any
    threshold: Any
    compare: Any
    stride: Any
    surround: Any
    min_presence: Any
    button: Any


@dataclass
class Results:
    """The output components of the page."""

    message: Any
    one_pass_picture: Any
    one_pass_time: Any
    window_column: Any
    window_picture: Any
    window_time: Any
    table: Any


class Segmenters:
    """
    The two pipelines that the page compares.

    Attributes:
        one_pass: loaded and, unless told otherwise, warmed up at once, so that the first image's time excludes
            initialisation.
    """

    def __init__(self, model: str | None, base: str | None, device: str | None, warm_up: bool = True):
        self.window_model, self.device = base or sliding_window_model(model), device
        self.one_pass = load_pipeline(model, device)
        if warm_up:
            segment_timed(self.one_pass, Image.new("RGB", (64, 64)), ["image"], background="auto")
        self.window: Any = None

    def sliding_window(self, stride: int, progress: Callable[[int, int], None]):
        """
        The pipeline of the sliding window, loaded on first use.

        Args:
            stride: in pixels.
            progress: called with the number of windows done and the number of all; an error that it raises ends the work.
        """
        if self.window is None:
            self.window = load_pipeline(self.window_model, self.device, stride=stride)
        vision = self.window.model.vision_model
        vision.stride, vision.progress = stride, progress
        return self.window


def build_page(
    model: str | None = None,
    base: str | None = None,
    device: str | None = None,
    stride: int = 24,
    on_gpu: Callable[[Callable], Callable] | None = None,
):
    """
    Build the page.

    Args:
        model: folder or hub id of a two-tower SPAR model; the embedded spar-tiny by default.
        base: model of the sliding window; by default the base of the embedded spar-tiny, for other models `model`.
        device: of both.
        stride: initial stride of the window in pixels.
        on_gpu: decorator of the function that computes, such as `spaces.GPU` of a ZeroGPU Space, where only decorated
            functions have a GPU.

    Returns:
        `gradio.Blocks` for [`launch_page`].

    Raises:
        ImportError: Gradio is not installed.
        ValueError, OSError: as [`load_pipeline`].
    """
    gr = import_gradio()
    segmenters = Segmenters(model, base, device, warm_up=on_gpu is None)
    name = Path(segmenters.one_pass.model.name_or_path).name
    # uploads older than a day are deleted once an hour
    with gr.Blocks(title="SPAR: masks from words", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(
            f"# Masks from words in one pass\nSPAR with `{name}`. Everything runs on the computer that serves this page."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                controls = add_controls(gr, segmenters.one_pass, stride)
            with gr.Column(scale=2, min_width=480):
                results = add_results(gr)
        run = segmentation_handler(gr, segmenters, results)
        connect(gr, run if on_gpu is None else on_gpu(run), controls, results)
    # every request waits in the queue: without `api_open=False`, requests of scripts would run beside it
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def default_edge(one_pass) -> int:
    """Shorter side of the checkpoint's working size in pixels."""
    return (one_pass.image_processor.size or {}).get("shortest_edge") or 672


def largest_edge(one_pass) -> int:
    """Largest shorter side of the working size that the page offers, in pixels."""
    return max(1024, default_edge(one_pass))


def add_controls(gr, one_pass, stride: int) -> Controls:
    """Add image, words and settings to the page, with the checkpoint's values."""
    edge = default_edge(one_pass)
    window = one_pass.model.config.image_size
    image = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=280)
    # the path only: Gradio would open the file before the handler can check it
    image.preprocess = lambda upload: None if upload is None else upload.path
    move_to_cache = image.async_move_resource_to_block_cache

    async def refuse_urls(source: str | Path | None) -> str | None:
        """Gradio downloads a URL that a request names instead of an upload."""
        if source is not None and not Path(source).is_absolute():
            raise gr.Error(NOT_UPLOADED)
        return await move_to_cache(source)

    image.async_move_resource_to_block_cache = refuse_urls
    threshold_info = "Pixels whose highest probability is below it become background."
    presence_info = "Leaves out classes that are less likely to be in the image at all. 0: not computed."
    return Controls(
        image=image,
        words=gr.Textbox(
            WORDS,
            label="Words",
            lines=3,
            info="“;” between classes, “,” between names of one class; or ade20k, voc21, …",
        ),
        shortest_edge=gr.Slider(
            64, largest_edge(one_pass), edge, step=16, label="Working resolution", info="Shorter side in pixels."
        ),
        threshold=gr.Slider(0, 1, 0, step=0.01, label="Background threshold", info=threshold_info),
        compare=gr.Checkbox(False, label="Compare with the sliding window (slow)"),
        stride=gr.Slider(8, window, stride, step=8, label="Stride of the window", info="In pixels.", visible=False),
        surround=gr.Checkbox(
            True, label="Among common stuff", info="Pixels nearer to stuff such as wall or grass stay unpainted."
        ),
        min_presence=gr.Slider(0, 1, 0, step=0.01, label="Minimum presence", info=presence_info),
        button=gr.Button("Segment", variant="primary"),
    )


def add_results(gr) -> Results:
    """Add the pictures, times and legend to the page; the column of the sliding window is hidden at first."""
    buttons = ["download", "fullscreen"]
    message = gr.HTML(visible=False, padding=False)
    with gr.Row():
        with gr.Column(min_width=240):
            one_pass_picture = gr.Image(label="One pass", interactive=False, buttons=buttons)
            one_pass_time = gr.Markdown()
        with gr.Column(min_width=240, visible=False) as window_column:
            window_picture = gr.Image(label="Sliding window", interactive=False, buttons=buttons)
            window_time = gr.Markdown()
    table = gr.HTML(padding=False)
    return Results(message, one_pass_picture, one_pass_time, window_column, window_picture, window_time, table)


def connect(gr, run: Callable[..., Any], controls: Controls, results: Results) -> None:
    """Connect the controls to the results of `run`."""
    controls.compare.change(lambda on: gr.Slider(visible=on), controls.compare, controls.stride, show_progress="hidden")
    gr.on(
        [controls.button.click, controls.words.submit],
        run,
        [component for name, component in vars(controls).items() if name != "button"],
        list(vars(results).values()),
    )


def segmentation_handler(gr, segmenters: Segmenters, results: Results) -> Callable[..., Iterator[list[Any]]]:
    """
    The function behind the button: yields the result of one pass, then that of the sliding window if asked for. All that it
    takes and yields can be pickled, since ZeroGPU calls it in another process.
    """
    names = list(vars(results))

    def outputs(**shown: Any) -> list[Any]:
        """A value for each component of the results, in their order; those not named stay as they are."""
        return [shown.get(name, gr.skip()) for name in names]

    def run(
        path: str | None,
        words: str,
        shortest_edge: int,
        threshold: float,
        compare: bool,
        stride: int,
        surround: bool,
        min_presence: float,
        progress=gr.Progress(),  # noqa: B008 - Gradio recognises it by its default
    ) -> Iterator[list[Any]]:
        try:
            progress(0, desc="reading the image")
            vocabulary = read_words(words)
            image = read_upload(path)
            edge = min(int(shortest_edge), largest_edge(segmenters.one_pass))
            background = "auto" if surround else None
            options = {"size": {"shortest_edge": edge}, "threshold": float(threshold), "background": background}
            if min_presence:
                options |= {"presence": True, "min_presence": float(min_presence)}
            embed_words(segmenters.one_pass, vocabulary, background, bool(min_presence), progress)
            progress(0, desc="one pass")
            first = segment_timed(segmenters.one_pass, image, vocabulary, **options)
            note = unknown_note(segmenters.one_pass.tokenizer, vocabulary)
            yield outputs(
                one_pass_picture=picture(image, first),
                one_pass_time=time_line(first),
                message=gr.update(value=note, visible=bool(note)),
                table=legend([("one pass", first)]),
                window_column=gr.update(visible=bool(compare)),
                window_picture=None,
                window_time="",
            )
            if not compare:
                return
            progress(0, desc="loading the sliding window")
            window = segmenters.sliding_window(max(1, int(stride)), limited(progress))
            embed_words(window, vocabulary, background, bool(min_presence), progress)
            second = segment_timed(window, image, vocabulary, **options)
        except (ValueError, OSError, RuntimeError) as error:
            # shown in the page, since Gradio's own errors cover the results
            yield outputs(message=gr.update(value=alert(error), visible=True))
            return
        yield outputs(
            window_picture=picture(image, second),
            window_time=time_line(second, first),
            table=legend([("one pass", first), ("sliding window", second)]),
        )

    return run


def embed_words(
    pipe: Any, vocabulary: Vocabulary, background: str | None, presence: bool, progress: Callable[..., Any]
) -> None:
    """
    Embed the words that a pipeline has not embedded yet, and report how many are done: a thousand take a minute. Background
    and presence compare the bare words with common ones first.
    """
    pipe.texts.refresh()

    def embed(words: Sequence[str], templates: Any, what: str) -> None:
        for start in range(0, len(words), NAMES_AT_ONCE):
            progress((start, len(words)), desc=what, unit="words")
            some = tuple(words[start : start + NAMES_AT_ONCE])
            pipe.text_embeds(Vocabulary(some[:1], (some,)), templates, check_weights=False)

    if background is not None or presence:
        common = dict.fromkeys([*vocabulary.all_names, *STUFF_WORDS, *ANCHOR_WORDS])
        embed(list(common), MEANING_TEMPLATES, "comparing with common words")
    embed(pipe.classes(vocabulary, background)[0].all_names, None, "embedding words")


def limited(progress: Callable[..., Any]) -> Callable[[int, int], None]:
    """Reports the windows done, and raises `TimeoutError` when they take too long."""
    end = time.monotonic() + MAX_SECONDS

    def report(done: int, total: int) -> None:
        if time.monotonic() > end:
            raise TimeoutError(
                f"The sliding window was stopped after {MAX_SECONDS} s, {done} of {total} windows. Take a larger stride or "
                "a lower working resolution."
            )
        progress((done, total), desc="sliding window", unit="windows")

    return report


def launch_page(
    page,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    wait: bool = True,
) -> str:
    """
    Serve the page without contacting any other computer, not even for fonts or scripts.

    Args:
        page (`gradio.Blocks`): from [`build_page`].
        host: address to serve; `"0.0.0.0"` serves the whole network.
        port: the first free one from 7860 on by default.
        open_browser: whether to open the page in the browser.
        wait: whether to serve until the process is stopped.

    Returns:
        URL of the page.

    Raises:
        OSError: the port is in use.
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
        # system fonts: the fonts of Gradio's themes are downloaded
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    return address
