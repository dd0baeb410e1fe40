"""The last results of a visitor, which the page brings back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from spar_hf.cli.web_hover import hover_maps
from spar_hf.cli.web_segmentation import Results, view_of
from spar_hf.cli.web_view import Shown, picture

KEPT = 6  # results of a visitor,
KEPT_BYTES = 64 * 2**20  # or fewer, if they are large
THUMBNAIL = 240  # longer side in pixels
# small pictures side by side, however few there are
HISTORY_STYLE = """
#spar-history .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)) !important; padding-top: 1.7rem; }
#spar-history .thumbnail-item { aspect-ratio: 4 / 3; }
"""


@dataclass
class Kept:
    """
    A result that can be brought back.

    Attributes:
        words: as they were typed.
        session: the results of one pass and, if there was one, of the sliding window.
        times: run times of both as the page says them.
        table: the legend, HTML.
    """

    words: str
    session: list[Shown]
    times: tuple[str, str]
    table: str

    @property
    def size(self) -> int:
        """Bytes in memory, nearly."""
        arrays = [np.asarray(part) for one in self.session for part in (one.image, one.label_map, one.result["heat"])]
        return sum(array.nbytes for array in arrays) + sum(len(one.png) for one in self.session)

    def thumbnail(self) -> tuple[Image.Image, str]:
        """A small picture of the masks, and the words."""
        small = picture(self.session[0], view_of(self.session[0].found(), 0.55, False, False, False, ""))
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        return small, self.words if len(self.words) < 40 else f"{self.words[:38]}…"


def keep(history: list[Kept] | None, new: Kept) -> list[Kept]:
    """The results to keep, the newest first; the result that is there already, after an error say, is not kept twice."""
    known = list(history or [])
    if known and (known[0].times, known[0].table) == (new.times, new.table):
        return known
    kept: list[Kept] = []
    total = 0
    for one in [new, *known][:KEPT]:
        total += one.size
        if kept and total > KEPT_BYTES:
            break
        kept.append(one)
    return kept


def keep_handler(gr) -> Callable[..., list[Any]]:
    """The function after a result: the history, and its thumbnails from the second result on."""

    def after(
        history: list[Kept] | None, session: list[Shown] | None, words: str, first: str, second: str, table: str
    ) -> list[Any]:
        if not session:
            return [history, gr.skip()]
        history = keep(history, Kept(words, session, (first, second or ""), table))
        pictures = [one.thumbnail() for one in history]
        return [history, gr.update(value=pictures, visible=len(history) > 1, selected_index=None)]

    return after


def history_handler(gr, results: Results) -> Callable[..., list[Any]]:
    """The function behind a click on a thumbnail: the values of all components of the results, and the words."""
    names = list(vars(results))

    def back(history: list[Kept] | None, opacity: float, outlines: bool, shown: bool, event) -> list[Any]:
        if not history or not 0 <= event.index < len(history):
            return [gr.skip()] * (len(names) + 1)
        kept = history[event.index]
        found = list(dict.fromkeys(label for one in kept.session for label in one.found()))
        labels = kept.session[0].labels
        view = view_of(found, opacity, outlines, shown, False, "")
        pictures = [picture(one, view) for one in kept.session]
        values = {
            "message": gr.update(visible=False),
            "one_pass_picture": pictures[0],
            "one_pass_time": kept.times[0],
            "window_column": gr.update(visible=len(pictures) > 1),
            "window_picture": pictures[1] if len(pictures) > 1 else None,
            "window_time": kept.times[1],
            "table": kept.table,
            "classes": gr.update(choices=found, value=found),
            "chosen": gr.update(choices=labels, value=(found or labels)[0]),
            "heat": False,
            "point": "",
            "hover": hover_maps(kept.session),
            "session": kept.session,
        }
        return [*(values.get(name, gr.skip()) for name in names), kept.words]

    back.__annotations__["event"] = gr.SelectData  # Gradio recognises it by its type
    return back
