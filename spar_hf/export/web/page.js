// What one sees and touches. The work is done in worker.js.

import { labelImage, palette } from "./labels.js";

const LONGEST_SIDE = 2048; // of the overlay, which only has to look right; labels keep the size of the image
const part = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });

let image = null; // the file
let result = null;
let requests = 0;

function say(text, isError = false) {
  part.status.textContent = text;
  part.status.classList.toggle("error", isError);
}

function run() {
  if (!image) return say("Choose an image first.", true);
  part.run.disabled = true;
  say("Starting");
  worker.postMessage({ id: ++requests, image, words: part.words.value, background: part.background.checked });
}

function choose(file) {
  if (!file) return;
  image = file;
  result = null;
  URL.revokeObjectURL(part.image.src);
  part.image.src = URL.createObjectURL(file);
  part.overlay.width = part.overlay.height = 0;
  part.drop.hidden = true;
  part.stage.hidden = false;
  part.found.hidden = true;
  part.hover.hidden = true;
  if (ready) run();
}

let ready = false;

worker.onmessage = ({ data }) => {
  if (data.status) return say(data.status);
  if (data.failed) return say(data.failed, true);
  if (data.ready) {
    ready = true;
    part.run.disabled = false;
    return image ? run() : say(data.ready === "webgpu" ? "Ready, on the graphics processor" : "Ready");
  }
  if (data.id !== requests) return; // of an earlier image
  part.run.disabled = false;
  if (data.error) return say(data.error, true);
  result = data.result;
  show();
};
worker.onerror = (event) => say(event.message || "This browser cannot run the page. Use a current one.", true);

function show() {
  const { labels, size, names, background, seconds, provider } = result;
  result.colours = palette(names.length, background);
  const counts = new Array(names.length).fill(0);
  for (const label of labels) counts[label]++;
  draw(labels, size, result.colours, background);
  const found = [...names.keys()].filter((label) => counts[label]);
  found.sort((a, b) => (a === background) - (b === background) || counts[b] - counts[a]);
  part.legend.replaceChildren(...found.map((label) => legendRow(label, counts[label] / labels.length)));
  part.found.hidden = false;
  const where = provider === "webgpu" ? "graphics processor" : "processor";
  say(`${size[1]} × ${size[0]} pixels, ${seconds.toFixed(1)} s on the ${where}`);
}

function legendRow(label, share) {
  const row = document.createElement("li");
  row.dataset.label = label;
  const [colour, name, value] = ["i", "span", "data"].map((tag) => row.appendChild(document.createElement(tag)));
  colour.style.background = `rgb(${result.colours[label].join(" ")})`;
  name.textContent = result.names[label];
  value.textContent = share < 0.005 ? "< 1 %" : `${Math.round(100 * share)} %`;
  return row;
}

// Colours of the classes with white borders between them; the background is not painted.
function draw(labels, [height, width], colours, background) {
  const scale = Math.min(1, LONGEST_SIDE / Math.max(height, width));
  const columns = Math.max(1, Math.round(width * scale));
  const rows = Math.max(1, Math.round(height * scale));
  const at = (row, column) => labels[Math.floor(((row + 0.5) * height) / rows) * width + Math.floor(((column + 0.5) * width) / columns)];
  const picture = new ImageData(columns, rows);
  for (let row = 0, i = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, i += 4) {
      const label = at(row, column);
      const border = (column && at(row, column - 1) !== label) || (row && at(row - 1, column) !== label);
      if (border) picture.data.fill(255, i, i + 4);
      else if (label !== background) picture.data.set([...colours[label], 255], i);
    }
  }
  part.overlay.width = columns;
  part.overlay.height = rows;
  part.overlay.getContext("2d").putImageData(picture, 0, 0);
}

function pointAt(event) {
  if (!result) return;
  const box = part.overlay.getBoundingClientRect();
  const [height, width] = result.size;
  const x = Math.floor(((event.clientX - box.left) / box.width) * width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * height);
  const inside = x >= 0 && y >= 0 && x < width && y < height;
  mark(inside ? result.labels[y * width + x] : null);
  if (!inside) return;
  part.hover.style.left = `${Math.min(Math.max(event.clientX - box.left, 50), Math.max(50, box.width - 50))}px`;
  part.hover.style.top = `${Math.max(event.clientY - box.top, 40)}px`;
}

function mark(label) {
  part.hover.hidden = label === null;
  part.hover.textContent = label === null ? "" : result.names[label];
  for (const row of part.legend.children) row.classList.toggle("here", Number(row.dataset.label) === label);
}

async function save() {
  const { labels, size, names, background } = result;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await labelImage(labels, size, names.length, background));
  link.download = `${(image.name ?? "image").replace(/\.[^.]*$/, "")}_labels.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

part.form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
part.words.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
});
part.image.addEventListener("load", () => part.stage.style.setProperty("--aspect", part.image.naturalWidth / part.image.naturalHeight));
part.file.addEventListener("change", () => {
  choose(part.file.files[0]);
  part.file.value = ""; // so that the same file can be chosen again
});
part.other.addEventListener("click", () => part.file.click());
part.save.addEventListener("click", save);
part.opacity.addEventListener("input", () => (part.overlay.style.opacity = part.opacity.value));
part.overlay.style.opacity = part.opacity.value;
part.overlay.addEventListener("pointermove", pointAt);
part.overlay.addEventListener("pointerdown", pointAt);
part.overlay.addEventListener("pointerleave", () => result && mark(null));
document.addEventListener("paste", (event) => choose([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", name.startsWith("drage") || name === "dragover");
    if (name === "drop") choose(event.dataTransfer.files[0]);
  });
}

// if the classes are part of the graph, there is nothing to ask: an image is segmented when it is chosen
const record = await (await fetch("spar_export.json")).json();
part.asked.hidden = part.run.hidden = Boolean(record.classes);
document.body.classList.toggle("baked", Boolean(record.classes));
