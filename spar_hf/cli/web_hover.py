"""The class under the cursor on the page: what the browser reads it from, and the script that does."""

import base64
import html
import io
import json
from collections.abc import Sequence

import numpy as np
from PIL import Image

from spar_hf.cli.web_view import Shown

STEP = 2  # every second pixel of the picture tells enough
HOVER = """() => {
  const tip = document.createElement("div");
  tip.id = "spar-tip";
  tip.hidden = true;
  document.body.append(tip);
  const read = new WeakMap();
  function pixels(image) {
    if (!read.has(image)) {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0);
      read.set(image, context.getImageData(0, 0, canvas.width, canvas.height));
    }
    return read.get(image);
  }
  document.addEventListener("pointermove", (event) => {
    tip.hidden = true;
    const block = event.target.closest?.("#spar-picture-0, #spar-picture-1");
    const picture = block?.querySelector("img");
    const map = block && document.querySelectorAll("#spar-map img")[Number(block.id.slice(-1))];
    if (!picture?.naturalWidth || !map?.naturalWidth) return;
    // the picture stands in the middle of its box; below it there may be the scale of a heat map
    const box = picture.getBoundingClientRect();
    const scale = Math.min(box.width / picture.naturalWidth, box.height / picture.naturalHeight);
    const width = picture.naturalWidth * scale, height = (width * map.naturalHeight) / map.naturalWidth;
    const x = (event.clientX - box.left - (box.width - width) / 2) / width;
    const y = (event.clientY - box.top - (box.height - picture.naturalHeight * scale) / 2) / height;
    if (x < 0 || x >= 1 || y < 0 || y >= 1) return;
    const { data } = pixels(map);
    const at = 4 * (Math.floor(y * map.naturalHeight) * map.naturalWidth + Math.floor(x * map.naturalWidth));
    const name = JSON.parse(map.dataset.names)[data[at] + 256 * data[at + 1]];
    tip.textContent = data[at + 2] ? `${name}, ${(data[at + 2] / 255).toFixed(2)}` : name;
    tip.style.left = `${event.clientX + 14}px`;
    tip.style.top = `${event.clientY + 14}px`;
    tip.hidden = false;
  });
}"""
HOVER_STYLE = """
#spar-map { display: none; }
#spar-tip { position: fixed; z-index: 1000; padding: .2rem .5rem; border-radius: 4px; background: #000c; color: #fff;
  font-size: .9rem; pointer-events: none; }
"""


def hover_maps(results: Sequence[Shown]) -> str:
    """
    An HTML image per result for the script `HOVER`: red and green are the number of the class at a pixel (its lower and
    higher byte), blue its probability, 0 to 255.
    """
    return "".join(_hover_map(shown) for shown in results)


def _hover_map(shown: Shown) -> str:
    label_map = shown.label_map[::STEP, ::STEP]
    pixels = np.stack([label_map & 255, label_map >> 8, np.zeros_like(label_map)], axis=2).astype(np.uint8)
    for index in np.unique(label_map).tolist():
        if index < len(shown.result["heat"]):  # a background without words has no probability
            levels = shown.heat_of(shown.labels[index])[::STEP, ::STEP]
            np.copyto(pixels[:, :, 2], levels, where=label_map == index)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    names = html.escape(json.dumps(shown.labels))
    return (
        f'<img alt="" data-names="{names}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )
