// Words as the library reads them: a class per line or semicolon, its names separated by commas; the background's words; and
// embeddings by the exported text tower.

const BACKGROUND = "background";
const SAME_MEANING = 0.5; // as in spar_hf/model/background.py
const PROMPTS_AT_ONCE = 64;

// What the person at the page can mend; everything else is a fault.
export class UserError extends Error {}

export const normaliseName = (name) => name.toLowerCase().split(/\s+/).filter(Boolean).join(" ");

// "road; car, automobile" -> [{ label: "road", names: ["road"] }, { label: "car", names: ["car", "automobile"] }]
export function parseClasses(text) {
  const lines = text.split(/[;\n]/).map((line) => line.trim()).filter(Boolean);
  if (!lines.length) throw new UserError("Name at least one class, for example: road; car, automobile; sky");
  const taken = new Map();
  return lines.map((line) => {
    const names = new Map();
    for (const part of line.split(/(?<!\\),/)) {
      const name = part.replaceAll("\\,", ",").trim();
      if (!name) throw new UserError(`“${line}” has an empty name; every name needs a word.`);
      if (!names.has(normaliseName(name))) names.set(normaliseName(name), name);
    }
    for (const key of names.keys()) {
      if (taken.has(key)) throw new UserError(`“${key}” stands for two classes. Merge or rename them.`);
      taken.set(key, line);
    }
    const found = [...names.values()];
    return { label: found[0], names: found };
  });
}

const dot = (one, other) => one.reduce((sum, value, i) => sum + value * other[i], 0);

function unit(row) {
  const norm = Math.sqrt(dot(row, row));
  return row.map((value) => value / norm);
}

export class Texts {
  // run: ids (rows of equal length) -> Promise of embeddings, an array of Float32Array
  constructor(tokenizer, run, settings, stuff) {
    Object.assign(this, { tokenizer, run, settings, stuff });
    this.rows = new Map(); // of names with the page's templates
    this.bare = new Map(); // of bare words
    this.keys = new Map();
    if (stuff) stuff.words.forEach((word, i) => this.rows.set(word, stuff.embeddings[i]));
  }

  tokens(text) {
    const ids = Array.from(this.tokenizer.encode(text).ids);
    const { max_tokens: limit, pad_token_id: pad, padding_side: side } = this.settings;
    if (ids.length > limit) throw new UserError(`“${text}” has ${ids.length} tokens, the model reads ${limit}. Shorten the name.`);
    const filled = new Array(limit - ids.length).fill(pad);
    return side === "left" ? [...filled, ...ids] : [...ids, ...filled];
  }

  prompts(name) {
    return this.settings.templates.map((template) => this.tokens(template.replace("{}", () => name)));
  }

  // Equal for names whose prompts have equal tokens.
  key(name) {
    if (!this.keys.has(name)) this.keys.set(name, this.prompts(name).join(" "));
    return this.keys.get(name);
  }

  // The mean of the embeddings of a name's prompts, normalised, for all names that are not known yet.
  async embed(names, templates, rows, progress) {
    const missing = names.filter((name) => !rows.has(name));
    const ids = missing.flatMap((name) => templates.map((template) => this.tokens(template.replace("{}", () => name))));
    const found = [];
    for (let start = 0; start < ids.length; start += PROMPTS_AT_ONCE) {
      progress(start / ids.length);
      found.push(...(await this.run(ids.slice(start, start + PROMPTS_AT_ONCE))));
    }
    missing.forEach((name, i) => {
      const mean = new Float32Array(found[0].length);
      for (const row of found.slice(i * templates.length, (i + 1) * templates.length)) {
        row.forEach((value, k) => (mean[k] += value / templates.length));
      }
      rows.set(name, unit(mean));
    });
    return names.map((name) => rows.get(name));
  }

  // Common stuff words that mean nothing that a class means.
  async stuffBeside(classes) {
    const others = classes.filter(({ label }) => normaliseName(label) !== BACKGROUND).flatMap(({ names }) => names);
    const taken = new Set(classes.flatMap(({ names }) => names.map(normaliseName)));
    const embedded = await this.embed(others, ["{}"], this.bare, () => {});
    const centred = (row) => unit(row.map((value, i) => value - this.stuff.centre[i]));
    const names = embedded.map(centred);
    return this.stuff.words.filter((word, i) => {
      const row = centred(this.stuff.bare[i]);
      return !taken.has(word) && !names.some((name) => dot(name, row) >= SAME_MEANING);
    });
  }

  // Classes with the background's words, without names that the tokenizer cannot tell from another of their class.
  async withBackground(classes, background) {
    classes = classes.map(({ label, names }) => ({ label, names: [...names] }));
    const words = background ? await this.stuffBeside(classes) : [];
    let own = classes.find(({ label }) => normaliseName(label) === BACKGROUND);
    if (words.length && !own) classes.push((own = { label: BACKGROUND, names: [] }));
    if (words.length) own.names.push(...words);
    const owners = new Map();
    const ordered = [...classes].sort((a, b) => (words.length ? (a === own) - (b === own) : 0)); // it gives way
    for (const entry of ordered) {
      entry.names = entry.names.filter((name) => {
        const key = this.key(name);
        const owner = owners.get(key);
        if (!owner) owners.set(key, { entry, name });
        else if (owner.entry !== entry && !(words.length && entry === own)) {
          throw new UserError(`“${owner.name}” and “${name}” have the same tokens, so the model cannot tell them apart.`);
        }
        return !owner;
      });
    }
    return { classes, background: words.length ? classes.indexOf(own) : -1 };
  }
}
