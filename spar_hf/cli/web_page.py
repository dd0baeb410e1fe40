"""The web page of `spar-hf app`: drop an image, type words and see masks, of one pass and of the sliding window."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spar_hf.cli.web_history import HISTORY_STYLE, history_handler, keep_handler
from spar_hf.cli.web_hover import HOVER, HOVER_STYLE
from spar_hf.cli.web_inputs import MAX_UPLOAD, NOT_UPLOADED, upload_folder
from spar_hf.cli.web_segmentation import (
    NO_REFINEMENT,
    Results,
    Segmenters,
    default_edge,
    draw_again,
    file_handler,
    largest_edge,
    point_handler,
    segmentation_handler,
)
from spar_hf.cli.web_view import FILES, STYLE
from spar_hf.model.refine import REFINEMENTS

# limits on what one visitor can ask of the computer that serves the page, beside those of `web_inputs`
MAX_WAITING = 16  # requests in the queue
MAX_SESSIONS = 32  # visitors whose last results are kept, up to about 100 MB each
SESSION_SECONDS = 3600  # after the last request of a visitor
WORDS = "sky; building; tree, vegetation; road, pavement; person; car"
# images inside installed packages, and words for what they show; those of Gradio are always there
EXAMPLES = [
    ("sklearn.datasets", "images/china.jpg", "building, temple; sky; tree"),
    ("skimage.data", "coffee.png", "cup; spoon; table"),
    ("sklearn.datasets", "images/flower.jpg", "flower; grass, leaves"),
    ("gradio", "media_assets/images/lion.jpg", "lion, animal; rock"),
    ("gradio", "media_assets/images/tower.jpg", "tower; sky; tree"),
]
DOWNLOADS = {
    "labels": "Label PNG",
    "overlay": "Overlay PNG",
    "json": "JSON",
    "coco": "COCO",
    "mask": "Mask of the class",
}
# on a narrow screen the results are below the fold
SCROLL = """() => {
  if (window.innerWidth < 768) document.getElementById("spar-results").scrollIntoView();
}"""
# a file that was made on a click is downloaded by a second, hidden button, once the page knows its address
FETCH = """() => setTimeout(() => {
  const link = document.querySelector("#spar-file a, a#spar-file, #spar-file");
  if (link) link.click();
}, 150)"""


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
    refine: Any
    button: Any


@dataclass
class Look:
    """The components below the pictures: how masks are drawn, and downloads."""

    opacity: Any
    outlines: Any
    names: Any
    buttons: dict[str, Any]
    file: Any
    thumbnails: Any
    history: Any


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
            with gr.Column(scale=2, min_width=320, elem_id="spar-results"):
                results, look = add_results(gr)
        run = segmentation_handler(gr, segmenters, results)
        connect(gr, run if on_gpu is None else on_gpu(run), controls, results, look)
        page.load(None, js=HOVER)
    # every request waits in the queue: without `api_open=False`, requests of scripts would run beside it
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def packaged(package: str, name: str) -> str | None:
    """Path of a file of an installed package, if there is one; the package is not imported."""
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return None
    path = None if found is None or found.origin is None else Path(found.origin).parent / name
    return str(path) if path is not None and path.is_file() else None


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
    controls = Controls(
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
        refine=gr.Dropdown(
            [NO_REFINEMENT, *sorted(REFINEMENTS)], value=NO_REFINEMENT, label="Refine the edges", info="Takes longer."
        ),
        button=gr.Button("Segment", variant="primary"),
    )
    found = [[path, words] for package, name, words in EXAMPLES if (path := packaged(package, name))]
    gr.Examples(found, [controls.image, controls.words], label="Examples", api_visibility="private")
    return controls


def add_results(gr) -> tuple[Results, Look]:
    """Add pictures, times, legend, controls of the drawing and downloads to the page, the last two hidden at first."""
    buttons = ["fullscreen"]
    message = gr.HTML(visible=False, padding=False)
    with gr.Row():
        with gr.Column(min_width=240):
            one_pass_picture = gr.Image(label="One pass", elem_id="spar-picture-0", interactive=False, buttons=buttons)
            one_pass_time = gr.Markdown()
        with gr.Column(min_width=240, visible=False) as window_column:
            window_picture = gr.Image(
                label="Sliding window", elem_id="spar-picture-1", interactive=False, buttons=buttons
            )
            window_time = gr.Markdown()
    with gr.Column(visible=False) as column:
        point = gr.Markdown()
        classes = gr.CheckboxGroup([], label="Classes in the picture")
        opacity = gr.Slider(0, 1, 0.55, step=0.05, label="Opacity")
        with gr.Row():
            outlines = gr.Checkbox(False, label="Outlines only", min_width=160)
            names = gr.Checkbox(True, label="Names in the regions", min_width=160)
        with gr.Row():
            chosen = gr.Dropdown([], label="One class", info="For its heat map and its mask.", min_width=160)
            heat = gr.Checkbox(False, label="Heat map of the class", min_width=160)
    table = gr.HTML(padding=False)
    with gr.Column(visible=False) as downloads:
        gr.Markdown("**Download** in the size of the image")
        with gr.Row():
            files = {kind: gr.Button(DOWNLOADS[kind], size="sm", min_width=110) for kind in FILES}
        file = gr.DownloadButton(elem_id="spar-file")  # not shown: see STYLE
    thumbnails = gr.Gallery(
        label="Earlier results",
        elem_id="spar-history",
        columns=6,
        height=175,
        object_fit="contain",
        visible=False,
        allow_preview=False,
        interactive=False,
        buttons=[],
    )
    history: Any = gr.State([], time_to_live=SESSION_SECONDS)
    hover = gr.HTML(elem_id="spar-map")
    session: Any = gr.State(time_to_live=SESSION_SECONDS)
    colours: Any = gr.State({})
    shown = (message, one_pass_picture, one_pass_time, window_column, window_picture, window_time, table)
    results = Results(*shown, column, downloads, classes, chosen, heat, point, hover, session, colours)
    return results, Look(opacity, outlines, names, files, file, thumbnails, history)


def connect(gr, run: Callable[..., Any], controls: Controls, results: Results, look: Look) -> None:
    """Connect the controls to the results of `run`, and the controls of the drawing to the pictures."""
    controls.compare.change(lambda on: gr.Slider(visible=on), controls.compare, controls.stride, show_progress="hidden")
    start = [controls.button.click, controls.words.submit]
    gr.on(start, None, js=SCROLL)
    given = [component for name, component in vars(controls).items() if name != "button"]
    finished = gr.on(
        start,
        run,
        [*given, look.opacity, look.outlines, look.names, results.colours],
        list(vars(results).values()),
        show_progress_on=results.one_pass_picture,  # on all components it would be said many times
    )
    finished.then(
        keep_handler(gr),
        [look.history, results.session, controls.words, results.one_pass_time, results.window_time, results.table],
        [look.history, look.thumbnails],
        show_progress="hidden",
        api_visibility="private",
    )
    look.thumbnails.select(
        history_handler(gr, results),
        [look.history, look.opacity, look.outlines, look.names],
        [*vars(results).values(), controls.words],
        show_progress="hidden",
        api_visibility="private",
    )
    drawn = [results.classes, look.opacity, look.outlines, look.names, results.heat, results.chosen]
    gr.on(
        [component.input for component in drawn],  # of the visitor: a new result draws its pictures itself
        draw_again,
        [results.session, *drawn],
        [results.one_pass_picture, results.window_picture],
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
    )
    for number, picture in enumerate((results.one_pass_picture, results.window_picture)):
        picture.select(
            point_handler(gr, number),
            results.session,
            results.point,
            show_progress="hidden",
            api_visibility="private",
        )
    for kind, button in look.buttons.items():
        made = button.click(
            file_handler(gr, kind),
            [results.session, *drawn],
            [look.file, results.message],
            show_progress="minimal",
            api_visibility="private",
        )
        made.then(None, js=FETCH)


def launch_page(
    page,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    wait: bool = True,
    say: Callable[[str], None] | None = None,
) -> str:
    """
    Serve the page without contacting any other computer, not even for fonts or scripts.

    Args:
        page (`gradio.Blocks`): from [`build_page`].
        host: address to serve; `"0.0.0.0"` serves the whole network.
        port: the first free one from 7860 on by default.
        open_browser: whether to open the page in the browser.
        wait: whether to serve until the process is stopped.
        say: called with the URL as soon as the page answers.

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
        prevent_thread_lock=True,
        quiet=True,  # no advice to make the page public
        share=False,
        state_session_capacity=MAX_SESSIONS,
        ssr_mode=False,
        footer_links=[],
        max_file_size=MAX_UPLOAD,
        css=STYLE + HOVER_STYLE + HISTORY_STYLE,
        # system fonts: the fonts of Gradio's themes are downloaded
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    if say is not None:
        say(address)
    if wait:
        page.block_thread()
    return address
