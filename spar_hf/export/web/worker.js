// The work behind the page: loads the graphs, prepares the image, embeds words, and runs the model. All in a worker, so that
// the page stays responsive.

import { decode, normalise, resize, workingSize } from "./images.js";
import { Texts, UserError, parseClasses } from "./words.js";

const say = (text) => postMessage({ status: text });
const percent = (share) => `${Math.round(100 * share)} %`;

async function get(name, kind = "json") {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name} is missing (${response.status}). Copy the exported folder again.`);
  return response[kind]();
}

async function download(name, title) {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name} is missing (${response.status}). Copy the exported folder again.`);
  const total = Number(response.headers.get("content-length"));
  const parts = [];
  let size = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    say(`Loading ${title}: ${(size / 1e6).toFixed(0)}${total >= size ? ` of ${(total / 1e6).toFixed(0)}` : ""} MB`);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

const page = await get("page.json");
const record = await get("spar_export.json");
const images = await get("preprocessor_config.json");
const address = (place) => new URL(place, import.meta.url).href; // a file beside this one, or an address of its own

async function hasGpu() {
  return Boolean(await navigator.gpu?.requestAdapter().catch(() => null));
}

class Model {
  static async load(provider) {
    const model = new Model();
    model.provider = provider;
    model.ort = await import(address(page.onnxruntime[provider]));
    model.ort.env.logLevel = "error";
    if (!crossOriginIsolated) model.ort.env.wasm.numThreads = 1;
    model.vision = await model.session(await download(page.graph, "the vision model"));
    return model;
  }

  session(bytes) {
    return this.ort.InferenceSession.create(bytes, { executionProviders: [this.provider], logSeverityLevel: 3 });
  }

  ints(values, shape) {
    return new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
  }

  async texts() {
    if (this.words) return this.words;
    const { Tokenizer } = await import(address(page.tokenizers));
    const tokenizer = new Tokenizer(await get("tokenizer.json"), await get("tokenizer_config.json"));
    const session = await this.session(await download(record.text_graph, "the text model"));
    const run = async (ids) => {
      const input = this.ints(ids.flat(), [ids.length, ids[0].length]);
      const { text_embeds: found } = await session.run({ input_ids: input });
      return ids.map((_, i) => found.data.slice(i * found.dims[1], (i + 1) * found.dims[1]));
    };
    this.words = new Texts(tokenizer, run, record.text, await stuffWords());
    return this.words;
  }
}

// The words of the background, embedded when the page was made: (their mean, bare words, with templates), a row each.
async function stuffWords() {
  const data = new Float32Array(await get("background.bin", "arrayBuffer"));
  const dim = record.projection_dim;
  const row = (i) => data.slice(i * dim, (i + 1) * dim);
  const words = page.background;
  return {
    words,
    centre: row(0),
    bare: words.map((_, i) => row(1 + i)),
    embeddings: words.map((_, i) => row(1 + words.length + i)),
  };
}

async function findClasses(model, words, background) {
  if (record.classes) {
    return { labels: record.classes.map(({ label }) => label), background: record.background ?? -1, inputs: {} };
  }
  const asked = parseClasses(words);
  const texts = await model.texts();
  const found = await texts.withBackground(asked, background);
  const names = found.classes.flatMap((entry) => entry.names);
  const rows = await texts.embed(names, record.text.templates, texts.rows, (share) => say(`Reading words: ${percent(share)}`));
  const dim = rows[0].length;
  const embeddings = new Float32Array(names.length * dim);
  rows.forEach((row, i) => embeddings.set(row, i * dim));
  return {
    labels: found.classes.map(({ label }) => label),
    background: found.background,
    inputs: {
      text_embeds: new model.ort.Tensor("float32", embeddings, [names.length, dim]),
      class_of_name: model.ints(found.classes.flatMap((entry, i) => entry.names.map(() => i)), [names.length]),
    },
  };
}

async function prepare(image) {
  const { pixels, size } = await decode(image);
  const rule = images.do_resize ?? true ? images.size : null;
  const working = workingSize(...size, rule, record.working_size.max_tokens, record.patch_size);
  return { values: normalise(resize(pixels, size, working, images.resample), images), size, working };
}

async function segment(model, { image, words, background }) {
  const classes = await findClasses(model, words, background);
  say("Preparing the image");
  const { values, size, working } = await prepare(image);
  say("Segmenting");
  const start = performance.now();
  const { labels, confidence } = await model.vision.run(
    {
      pixel_values: new model.ort.Tensor("float32", values, [1, 3, ...working]),
      image_size: model.ints(size, [2]),
      ...classes.inputs,
    },
    ["labels", "confidence"],
  );
  // float16 as numbers of 16 bits where a browser has no array of them: an exponent of ones is no finite number
  const first = confidence.data[0]; // one value that is no number makes all of an image so
  if (confidence.data instanceof Uint16Array ? (first & 0x7c00) === 0x7c00 : !Number.isFinite(first)) {
    throw new UserError(
      "The features of the image are not finite: half precision overflowed, or the weights are damaged. Export with --dtype fp32.",
    );
  }
  return {
    labels: labels.data,
    size,
    names: classes.labels,
    background: classes.background,
    seconds: (performance.now() - start) / 1000,
    provider: model.provider,
  };
}

let model = hasGpu().then((gpu) => (gpu ? Model.load("webgpu").catch(() => Model.load("wasm")) : Model.load("wasm")));
model.then(({ provider }) => postMessage({ ready: provider }), (error) => postMessage({ failed: error.message }));

async function answer(request) {
  try {
    return await segment(await model, request);
  } catch (error) {
    if (error instanceof UserError || (await model).provider !== "webgpu") throw error;
    model = Model.load("wasm"); // the driver may lack something that the model needs
    return segment(await model, request);
  }
}

onmessage = async ({ data }) => {
  try {
    const result = await answer(data);
    postMessage({ result, id: data.id }, [result.labels.buffer]);
  } catch (error) {
    postMessage({ error: error.message, id: data.id });
  }
};
