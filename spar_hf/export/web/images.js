// From an image file to the pixels the model sees, as the image processor of Python makes them, to the last bit: the size
// rule, Pillow's resizing, normalisation. What a canvas offers instead differs by several levels, which changes labels.

import { UserError } from "./words.js";

const PRECISION = 22; // bits after the point of Pillow's weights for 8-bit levels

// the numbers are those of PIL.Image.Resampling; NEAREST (0) is not among them
const FILTERS = {
  1: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)],
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  3: [2, bicubic],
  4: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  5: [1, hamming],
};

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

function hamming(x) {
  x = Math.abs(x);
  if (x === 0) return 1;
  if (x >= 1) return 0;
  x *= Math.PI;
  return (Math.sin(x) / x) * (0.54 + 0.46 * Math.cos(x));
}

// First input pixel and weights of every output pixel of an axis.
function weights(length, newLength, filter) {
  const [radius, shape] = FILTERS[filter];
  const scale = length / newLength;
  const spread = Math.max(scale, 1);
  const support = radius * spread;
  const table = [];
  for (let i = 0; i < newLength; i++) {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(length, Math.trunc(centre + support + 0.5));
    const values = [];
    for (let j = first; j < last; j++) values.push(shape((j - centre + 0.5) * (1 / spread)));
    const sum = values.reduce((total, value) => total + value, 0);
    const whole = values.map((value) => {
      const share = (sum === 0 ? value : value / sum) * 2 ** PRECISION;
      return Math.trunc(share < 0 ? share - 0.5 : share + 0.5);
    });
    table.push([first, Int32Array.from(whole)]);
  }
  return table;
}

function level(sum) {
  const value = sum >> PRECISION;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

// Levels `(height, width, 3)` resized as Pillow does: rows first, then columns, rounded to levels in between.
export function resize(pixels, [height, width], [newHeight, newWidth], filter) {
  if (!(filter in FILTERS)) throw new Error(`The image processor's filter ${filter} is not known here.`);
  if (newWidth !== width) {
    const table = weights(width, newWidth, filter);
    const found = new Uint8Array(height * newWidth * 3);
    for (let y = 0, out = 0; y < height; y++) {
      for (let x = 0; x < newWidth; x++) {
        const [first, parts] = table[x];
        let red = 1 << (PRECISION - 1), green = red, blue = red;
        for (let k = 0, at = (y * width + first) * 3; k < parts.length; k++) {
          red += pixels[at++] * parts[k];
          green += pixels[at++] * parts[k];
          blue += pixels[at++] * parts[k];
        }
        found[out++] = level(red);
        found[out++] = level(green);
        found[out++] = level(blue);
      }
    }
    pixels = found;
  }
  if (newHeight !== height) {
    const table = weights(height, newHeight, filter);
    const row = newWidth * 3;
    const found = new Uint8Array(newHeight * row);
    for (let y = 0, out = 0; y < newHeight; y++) {
      const [first, parts] = table[y];
      for (let x = 0; x < row; x++) {
        let sum = 1 << (PRECISION - 1);
        for (let k = 0, at = first * row + x; k < parts.length; k++, at += row) sum += pixels[at] * parts[k];
        found[out++] = level(sum);
      }
    }
    pixels = found;
  }
  return pixels;
}

// Height and width that the model sees, by the `size` and `max_tokens` of the image processor.
export function workingSize(height, width, size, maxTokens, patch) {
  let found = [height, width];
  if (size?.height) {
    found = [size.height, size.width];
  } else if (size) {
    // of the two scales the smaller one, as a fraction; a side is rounded to the nearest pixel, halves up
    const scales = [];
    if (size.shortest_edge) scales.push([size.shortest_edge, Math.min(height, width)]);
    if (size.longest_edge) scales.push([size.longest_edge, Math.max(height, width)]);
    const [top, bottom] = scales.reduce((one, other) => (other[0] * one[1] < one[0] * other[1] ? other : one));
    found = found.map((side) => Math.max(1, Math.floor((2 * side * top + bottom) / (2 * bottom))));
  }
  if (Math.ceil(found[0] / patch) * Math.ceil(found[1] / patch) <= maxTokens) return found;
  const scale = Math.sqrt(maxTokens / (found[0] * found[1]));
  return found.map((side) => Math.min(Math.max(1, Math.floor(side * scale)), maxTokens) * patch);
}

// An image file as upright levels `(height, width, 3)`; what shines through is blended with white.
export async function decode(blob) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(blob, options).catch(() => {
    throw new UserError("The browser cannot read this file. Save the image as JPEG or PNG.");
  });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  const pixels = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    const alpha = data[from + 3];
    for (let channel = 0; channel < 3; channel++) {
      const value = data[from + channel];
      pixels[to++] = alpha === 255 ? value : Math.round((value * alpha + 255 * (255 - alpha)) / 255);
    }
  }
  return { pixels, size: [height, width] };
}

// Levels as the model's input `(3, height, width)`, by float32 operations in the order of NumPy.
export function normalise(pixels, settings) {
  const count = pixels.length / 3;
  const found = new Float32Array(pixels.length);
  const round = Math.fround;
  for (let channel = 0; channel < 3; channel++) {
    const table = Float32Array.from({ length: 256 }, (_, value) => {
      if (settings.do_rescale ?? true) value = round(value * round(settings.rescale_factor));
      if (!(settings.do_normalize ?? true)) return value;
      return round(round(value - round(settings.image_mean[channel])) / round(settings.image_std[channel]));
    });
    for (let i = 0; i < count; i++) found[channel * count + i] = table[pixels[3 * i + channel]];
  }
  return found;
}
