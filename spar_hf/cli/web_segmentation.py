"""What the buttons of the page do: segment an upload, draw its masks anew, write files."""

import html
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from spar_hf.cli.pipelines import load_pipeline, segment_timed, sliding_window_model
from spar_hf.cli.web_hover import hover_maps
from spar_hf.cli.web_inputs import alert, read_upload, read_words
from spar_hf.cli.web_view import Shown, View, colours_of, legend, picture, there, write_file
from spar_hf.model.background import MEANING_TEMPLATES
from spar_hf.model.prompts import Vocabulary, unknown_names
from spar_hf.model.vocabularies import ANCHOR_WORDS, STUFF_WORDS

MAX_SECONDS = 300  # for a sliding window
NO_REFINEMENT = "no"  # choice of the page
NAMES_AT_ONCE = 16  # embedded between two reports of progress
ERRORS = (ValueError, OSError, RuntimeError, ImportError)  # shown in the page, since Gradio's own cover the results


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
    look: Any
    downloads: Any
    classes: Any
    chosen: Any
    heat: Any
    point: Any
    hover: Any
    session: Any
    colours: Any


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


def unknown_note(tokenizer: Any, vocabulary: Vocabulary) -> str:
    """A note in HTML about names whose characters the tokenizer does not know, if any."""
    unknown = unknown_names(tokenizer, vocabulary.all_names)
    text = f"The model does not know the characters of {', '.join(unknown[:5])}, so the masks may be wrong."
    return f'<p class="spar-note">{html.escape(text)}</p>' if unknown else ""


def time_line(result: dict[str, Any], first: dict[str, Any] | None = None) -> str:
    """Run times of a method as text, and their ratio to those of the first method."""
    ratio = "" if first is None else f", {result['forward_seconds'] / first['forward_seconds']:.1f} × one pass"
    return f"**{result['forward_seconds']:.2f} s** vision forward{ratio} · {result['seconds']:.2f} s in total"


def default_edge(one_pass) -> int:
    """Shorter side of the checkpoint's working size in pixels."""
    return (one_pass.image_processor.size or {}).get("shortest_edge") or 672


def largest_edge(one_pass) -> int:
    """Largest shorter side of the working size that the page offers, in pixels."""
    return max(1024, default_edge(one_pass))


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
        refine: str,
        opacity: float,
        outlines: bool,
        names_shown: bool,
        known: dict[str, int] | None,
        progress=gr.Progress(),  # noqa: B008 - Gradio recognises it by its default
    ) -> Iterator[list[Any]]:
        try:
            progress(0, desc="reading the image")
            vocabulary = read_words(words)
            image_range = segmenters.one_pass.image_processor.image_range
            image = read_upload(path, image_range)
            edge = min(int(shortest_edge), largest_edge(segmenters.one_pass))
            background = "auto" if surround else None
            options = {"size": {"shortest_edge": edge}, "threshold": float(threshold), "background": background}
            if min_presence:
                options |= {"presence": True, "min_presence": float(min_presence)}
            if refine != NO_REFINEMENT:
                options["refine"] = str(refine)
            embed_words(segmenters.one_pass, vocabulary, background, bool(min_presence), progress)
            progress(0, desc="one pass")
            first = segment_timed(segmenters.one_pass, image, vocabulary, heat=True, **options)
            first["image_range"] = image_range  # for the picture that is downloaded
            note = unknown_note(segmenters.one_pass.tokenizer, vocabulary)
            view = View(None, float(opacity), bool(outlines), bool(names_shown))
            values = one_pass_values(gr, str(path), image, first, view, known or {})
            yield outputs(
                **values,
                message=gr.update(value=note, visible=bool(note)),
                window_column=gr.update(visible=bool(compare)),
            )
            if not compare:
                return
            progress(0, desc="loading the sliding window")
            window = segmenters.sliding_window(max(1, int(stride)), limited(progress))
            embed_words(window, vocabulary, background, bool(min_presence), progress)
            second = segment_timed(window, image, vocabulary, heat=True, **options) | {"image_range": image_range}
            yield outputs(**window_values(gr, image, first, second, view, **values))
        except ERRORS as error:
            yield outputs(message=gr.update(value=alert(error), visible=True))

    return run


def one_pass_values(
    gr, path: str, image: Image.Image, first: dict[str, Any], view: View, known: dict[str, int]
) -> dict[str, Any]:
    """The values of the components that show one pass; `known` are the colours of all words so far."""
    colours, known = colours_of(first, known)
    shown = Shown.make("one pass", path, image, first, colours)
    found, labels = shown.found(), list(first["labels"])
    return {
        "one_pass_picture": picture(shown, view),
        "one_pass_time": time_line(first),
        "table": legend([("one pass", first)], colours),
        "window_picture": None,
        "window_time": "",
        "look": gr.update(visible=True),
        "downloads": gr.update(visible=True),
        "classes": gr.update(choices=found, value=found),
        "chosen": gr.update(choices=labels, value=(found or labels)[0]),
        "heat": False,
        "point": "",
        "hover": hover_maps([shown]),
        "session": [shown],
        "colours": known,
    }


def window_values(
    gr,
    image: Image.Image,
    first: dict[str, Any],
    second: dict[str, Any],
    view: View,
    session: list[Shown],
    colours: dict[str, int],
    **others: Any,
) -> dict[str, Any]:
    """The values of the components that show the sliding window, `second`, beside those of one pass, `first`."""
    own, known = colours_of(second, colours)
    session = [*session, Shown.make("sliding window", session[0].upload, image, second, own)]
    found = list(dict.fromkeys(label for one in session for label in one.found()))
    longest = max(first, second, key=lambda result: len(result["labels"]))
    return {
        "window_picture": picture(session[1], view),
        "window_time": time_line(second, first),
        "table": legend([("one pass", first), ("sliding window", second)], colours_of(longest, known)[0]),
        "classes": gr.update(choices=found, value=found),
        "hover": hover_maps(session),
        "session": session,
        "colours": known,
    }


def view_of(
    classes: Sequence[str] | None, opacity: float, outlines: bool, names: bool, heat: bool, chosen: str
) -> View:
    """How to draw the masks, from the values of the controls."""
    opacity = min(max(float(opacity), 0.0), 1.0)
    return View(list(classes or []), opacity, bool(outlines), bool(names), chosen if heat else None)


def draw_again(session: list[Shown] | None, *controls: Any) -> list[Any]:
    """The pictures of one pass and of the window, drawn as the controls of [`view_of`] say."""
    shown = session or []
    pictures: list[Any] = [picture(one, view_of(*controls)) for one in shown]
    return pictures + [None] * (2 - len(pictures))


def point_handler(gr, number: int) -> Callable[..., str]:
    """The function behind a click on a picture: the class there and its probability."""

    def say(session: list[Shown] | None, event) -> str:
        if not session or len(session) <= number:
            return ""
        shown = session[number]
        return f"**{shown.method}**, where you clicked: {html.escape(there(shown, *map(int, event.index)))}"

    say.__annotations__["event"] = gr.SelectData  # Gradio recognises it by its type
    return say


def file_handler(gr, kind: str) -> Callable[..., list[Any]]:
    """The function behind a download: the file, and a message if there is none."""

    def make(session: list[Shown] | None, *controls: Any) -> list[Any]:
        if not session:
            return [None, gr.skip()]
        try:
            return [str(write_file(session[0], kind, view_of(*controls), controls[-1])), gr.update(visible=False)]
        except ERRORS as error:
            return [None, gr.update(value=alert(error), visible=True)]

    return make


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
