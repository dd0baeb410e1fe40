// Colours of classes, and label maps as PNG files, as `spar-hf segment` writes them: class numbers as indices of 8 bits into a
// palette; more than 256 classes as grey levels of 16 bits. A canvas writes neither.

const GREY = [140, 140, 140]; // of the background

// Any two, and grey, differ for people with normal sight, deuteranopia and protanopia: those of spar_hf/cli/overlays.py.
const FIRST_COLOURS = [
  [242, 140, 0], [0, 64, 140], [242, 242, 0], [115, 191, 242], [115, 0, 0], [140, 115, 255],
  [38, 255, 242], [166, 217, 166], [191, 115, 89], [89, 0, 255], [140, 89, 0], [115, 0, 64],
];

// Distinct colours; of those after the first 12, hues are spaced by the golden ratio and brightness alternates.
export function palette(classes, background) {
  const more = (i) => colour((i * 0.618034) % 1, [0.85, 0.6][i % 2], [1, 0.8, 0.95][i % 3]);
  const colours = Array.from({ length: classes }, (_, i) => FIRST_COLOURS[i] ?? more(i));
  if (background >= 0) colours[background] = GREY;
  return colours;
}

function colour(hue, saturation, value) {
  const channel = (n) => {
    const k = (n + hue * 6) % 6;
    return Math.round(255 * (value - value * saturation * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return [channel(5), channel(3), channel(1)];
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function chunk(type, data) {
  const bytes = new Uint8Array(data.length + 12);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set([...type].map((letter) => letter.charCodeAt(0)), 4);
  bytes.set(data, 8);
  let sum = 0xffffffff;
  for (let i = 4; i < data.length + 8; i++) sum = CRC[(sum ^ bytes[i]) & 255] ^ (sum >>> 8);
  view.setUint32(data.length + 8, ~sum);
  return bytes;
}

export async function labelImage(labels, [height, width], classes, background) {
  const wide = classes > 256;
  const row = width * (wide ? 2 : 1) + 1; // a row begins with the number of its filter: 0, none
  const rows = new Uint8Array(height * row);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0, at = y * row + 1; x < width; x++, i++) {
      if (wide) rows[at++] = labels[i] >> 8;
      rows[at++] = labels[i] & 255;
    }
  }
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  header.set([wide ? 16 : 8, wide ? 0 : 3], 8); // bits, and grey or palette
  const packed = await new Response(new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"))).arrayBuffer();
  const colours = wide ? [] : [chunk("PLTE", Uint8Array.from(palette(classes, background).flat()))];
  const signature = Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10);
  const parts = [signature, chunk("IHDR", header), ...colours, chunk("IDAT", new Uint8Array(packed)), chunk("IEND", [])];
  return new Blob(parts, { type: "image/png" });
}
