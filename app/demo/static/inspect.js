// <studio-inspect>: which blocks a layer and head visit at a step, where the attention is, and what
// the token under the mouse sees of the video.
"use strict";

const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // viridis
const TABLES = [["recall", "share of the attention that the visited blocks hold"], ["best", "the most that as many blocks could hold"], ["density", "share of blocks visited"], ["error", "of the output, against dense"]];

function colour(share) {
  const at = Math.min(0.9999, Math.max(0, share)) * (RAMP.length - 1), i = Math.floor(at);
  return RAMP[i].map((x, channel) => Math.round(x + (RAMP[i + 1][channel] - x) * (at - i)));
}

function half(bits) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : (2 ** -14 * fraction) / 1024;
}

class StudioInspect extends HTMLElement {
  async connectedCallback() {
    const { h } = studio;
    const { card } = this;
    this.files = new Map();
    this.at = { step: card.measured.at(-1), layer: card.looks.at(-1)?.layer ?? 0, head: 0 };
    this.table = "recall";
    this.token = this.middle();
    const select = (label, values) => h("select", { "aria-label": label, onchange: (event) => this.go({ [label.toLowerCase()]: Number(event.target.value) }) }, values.map((value) => h("option", { value: String(value) }, String(value))));
    this.selects = { step: select("Step", card.measured), layer: select("Layer", [...new Set(card.looks.map((look) => look.layer))]), head: select("Head", [...Array(card.heads).keys()]) };
    this.numbers = h("p", { class: "st-faint st-numbers", role: "status" });
    this.own = h("button", { class: "st-plain", "aria-pressed": "false", onclick: () => { this.planned = !this.planned; this.column = undefined; this.paintMaps(); this.paintFrames(); } });
    this.share = this.map("Visited blocks", this.own, ["left out", "visited"]);
    this.mass = this.map("Exact attention of each block", "in the order of the video", ["none", "most, logarithmic"]);
    this.frames = h("div", { class: "st-frames", tabindex: "0", role: "group", "aria-label": "Tokens of the video: arrow keys choose one, Page Up and Down change the frame", onkeydown: (event) => this.key(event) });
    this.said = h("p", { class: "st-faint", role: "status" });
    this.mode = h("div", { class: "st-segments", role: "group", "aria-label": "What the frames show" }, [["sees", "What a token sees"], ["order", "Order of the tokens"]].map(([mode, title]) => h("button", { "data-mode": mode, onclick: () => { this.showing = mode; this.paintFrames(); } }, title)));
    this.showing = "sees";
    this.overview = h("div", { class: "st-overview" });
    this.replaceChildren(h("div", { class: "st-card" }, h("h3", {}, card.prompt), h("p", { class: "st-faint" }, studio.facts(card)), this.used(),
      h("div", { class: "st-controls" }, Object.entries(this.selects).map(([name, field]) => h("label", {}, name, field))), this.numbers,
      h("div", { class: "st-maps" }, this.share.element, this.mass.element),
      h("div", { class: "st-views" }, this.mode, this.said), this.frames, this.overview));
    this.pictures = await this.decode();
    this.build();
    await this.go({});
  }

  // What the colours of a heat map run from and to.
  scale() {
    const { h } = studio;
    const low = h("span", {}), high = h("span", {});
    return { low, high, element: h("p", { class: "st-scale" }, low, h("i", {}), high) };
  }

  middle() {
    const [frames, height, width] = this.card.grid;
    return (Math.floor(frames / 2) * height + Math.floor(height / 2)) * width + Math.floor(width / 2);
  }

  // The method of this result; the form above may have another by now.
  used() {
    const { h } = studio;
    const { name, method, label } = this.card.runs[0];
    const kind = this.card.method.split("(")[0];
    const fields = Object.entries(method.fields).filter(([, value]) => value !== null).map(([field, value]) => `${field.replaceAll("_", " ")} ${value}`);
    return h("div", {}, h("p", { class: "st-used" }, "Made with ", h("strong", {}, label.includes("=") ? label.replace(" ", ", ") : name), ` (${kind})`),
      h("details", { class: "st-code" }, h("summary", {}, "its settings"), h("p", { class: "st-faint" }, fields.join(" · "))));
  }

  // The same with keys as with the mouse.
  key(event) {
    const [frames, height, width] = this.card.grid, all = frames * height * width;
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width, PageUp: -height * width, PageDown: height * width }[event.key];
    if (!by || !this.plan) return;
    event.preventDefault();
    event.stopPropagation();
    this.look((this.token + by + all) % all);
  }

  map(title, beside, [low, high]) {
    const { h } = studio;
    const canvas = h("canvas", { class: "st-map", role: "img", "aria-label": title });
    canvas.addEventListener("pointermove", (event) => this.hover(event, canvas));
    canvas.addEventListener("pointerdown", (event) => this.hover(event, canvas));
    return { canvas, element: h("figure", {}, h("figcaption", {}, title, h("span", { class: "st-faint" }, beside)), canvas, h("p", { class: "st-scale" }, low, h("i", {}), high)) };
  }

  // One picture of the video for each latent frame.
  async decode() {
    const { card } = this, count = card.grid[0], pictures = [];
    const each = count > 1 ? (card.frames - 1) / (count - 1) : 1;
    try {
      const wanted = Array.from({ length: count }, (_, i) => Math.round(i * each));
      await studio.decode(studio.file(card.name, card.video), card.fps, wanted, (i, picture) => { pictures[wanted.indexOf(i)] = picture; });
    } catch (error) {
      studio.say(error.message);
    }
    return pictures;
  }

  build() {
    const { h } = studio;
    const [frames, height, width] = this.card.grid;
    const size = Math.max(4, Math.round(200 / width));
    this.screens = Array.from({ length: frames }, (_, frame) => {
      const canvas = h("canvas", { width: width * size, height: height * size, role: "img", "aria-label": `Latent frame ${frame}` });
      const pick = (event) => {
        const box = canvas.getBoundingClientRect();
        const x = Math.min(width - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * width)));
        const y = Math.min(height - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * height)));
        this.look((frame * height + y) * width + x);
      };
      canvas.addEventListener("pointermove", pick);
      canvas.addEventListener("pointerdown", pick);
      return canvas;
    });
    this.frames.replaceChildren(...this.screens);
    this.buildOverview();
  }

  async go(change) {
    Object.assign(this.at, change);
    const { step, layer, head } = this.at;
    for (const [name, field] of Object.entries(this.selects)) field.value = this.at[name];
    const look = this.card.looks.find((one) => one.step === step && one.layer === layer);
    const entry = look?.heads.find((one) => one.head === head);
    this.dataset.ready = "no";
    if (!entry) return;
    try {
      const buffer = await this.read(look.file);
      if (this.at.step !== step || this.at.layer !== layer || this.at.head !== head) return;
      this.plan = this.open(buffer, entry);
    } catch (error) {
      this.numbers.textContent = error.message;
      return;
    }
    const row = this.card.measured.indexOf(step), value = (name) => this.card.tables[name][row][layer][head];
    this.numbers.textContent = `density ${studio.number(value("density"), 3)} · recall ${studio.number(value("recall"), 3)} of at most ${studio.number(value("best"), 3)} with as many blocks · output error ${studio.number(value("error"), 3)}` + (look.why ? ` · dense here (${look.why.replaceAll("_", " ")})` : "");
    this.paintMaps();
    this.paintFrames();
    this.paintOverview();
    this.dataset.ready = "yes";
  }

  async read(file) {
    if (!this.files.has(file)) this.files.set(file, fetch(studio.file(this.card.name, file)).then((answer) => { if (!answer.ok) throw new Error("The maps of this run are not there any more."); return answer.arrayBuffer(); }));
    return this.files.get(file);
  }

  open(buffer, entry) {
    const part = (place, Kind) => place && new Kind(buffer, place[0], place.slice(1).reduce((a, b) => a * b, 1));
    const plan = { ...entry, keepShape: entry.keep.slice(1), shareShape: entry.share.slice(1), keep: part(entry.keep, Uint8Array), share: part(entry.share, Uint8Array), mass: part(entry.mass, Uint16Array), order: part(entry.order, Int32Array) };
    plan.places = new Int32Array(plan.tokens);
    if (plan.order) plan.order.forEach((token, place) => { if (token >= 0) plan.places[token] = place; });
    else plan.places.forEach((_, token) => { plan.places[token] = token; });
    return plan;
  }

  paintMaps() {
    const { share, mass, shareShape: [rows, columns] } = this.plan;
    const most = Math.log2(1 + Math.max(...Array.from({ length: Math.min(rows * columns, 4096) }, (_, i) => half(mass[Math.floor((i * rows * columns) / Math.min(rows * columns, 4096))]))) * columns);
    const planned = this.planned && this.plan.order, [own, others] = this.plan.keepShape;
    this.own.textContent = planned ? "in the method's order" : "in the order of the video";
    this.own.disabled = !this.plan.order;
    this.own.setAttribute("aria-pressed", String(Boolean(planned)));
    if (planned) this.paintMap(this.share.canvas, own, others, (i) => colour(this.plan.keep[i]));
    else this.paintMap(this.share.canvas, rows, columns, (i) => colour(share[i] / 255));
    // Logarithmic: most of the attention is in few blocks.
    this.paintMap(this.mass.canvas, rows, columns, (i) => colour(Math.log2(1 + half(mass[i]) * columns) / most));
  }

  paintMap(canvas, rows, columns, colourOf) {
    const image = new ImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) {
      const [red, green, blue] = colourOf(i);
      image.data.set([red, green, blue, 255], 4 * i);
    }
    canvas.width = columns;
    canvas.height = rows;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.still = image;
  }

  // A pair of blocks under the mouse: its first query becomes the token.
  hover(event, canvas) {
    if (!this.plan) return;
    const planned = this.planned && this.plan.order && canvas === this.share.canvas;
    const box = canvas.getBoundingClientRect(), [rows, columns] = planned ? this.plan.keepShape : this.plan.shareShape;
    const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
    const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
    if (planned) this.look(Math.max(0, this.plan.order[row * this.plan.blocks[0]]));
    else this.look(Math.min(row * this.plan.blocks[0], this.plan.tokens - 1), column);
  }

  look(token, column) {
    this.token = token;
    this.column = column;
    this.paintFrames();
  }

  visited(token) {
    const { keep, keepShape, blocks, places } = this.plan;
    const row = Math.floor(places[token] / blocks[0]) * keepShape[1];
    return (other) => keep[row + Math.floor(places[other] / blocks[1])] > 0;
  }

  paintFrames() {
    if (!this.plan || !this.screens) return;
    const [frames, height, width] = this.card.grid, each = height * width;
    for (const button of this.mode.children) button.setAttribute("aria-pressed", String(button.dataset.mode === this.showing));
    const sees = this.visited(this.token);
    let count = 0;
    const mask = new OffscreenCanvas(width, height), context = mask.getContext("2d");
    this.screens.forEach((canvas, frame) => {
      const image = new ImageData(width, height);
      for (let i = 0; i < each; i++) {
        const token = frame * each + i, seen = sees(token);
        count += seen;
        image.data.set(this.showing === "order" ? [...colour(this.plan.places[token] / this.plan.places.length), 215] : seen ? [45, 212, 191, 40] : [8, 12, 16, 190], 4 * i);
      }
      context.putImageData(image, 0, 0);
      const screen = canvas.getContext("2d");
      if (this.pictures[frame]) screen.drawImage(this.pictures[frame], 0, 0, canvas.width, canvas.height);
      screen.imageSmoothingEnabled = false;
      screen.drawImage(mask, 0, 0, canvas.width, canvas.height);
      screen.imageSmoothingEnabled = true;
      if (Math.floor(this.token / each) === frame) this.markToken(screen, canvas.width / width);
    });
    this.say(count, frames * each);
    this.markMaps();
  }

  markToken(screen, size) {
    const [, height, width] = this.card.grid, place = this.token % (height * width);
    screen.strokeStyle = "#fff";
    screen.lineWidth = 2;
    screen.strokeRect((place % width) * size - 1, Math.floor(place / width) * size - 1, size + 2, size + 2);
  }

  say(count, all) {
    const [frames, height, width] = this.card.grid, { token, plan } = this;
    const where = token < frames * height * width ? `frame ${Math.floor(token / (height * width))}, y ${Math.floor(token / width) % height}, x ${token % width}` : "text";
    const block = this.column === undefined ? "" : ` · blocks ${Math.floor(token / plan.blocks[0])} and ${this.column}: attention ${half(plan.mass[Math.floor(token / plan.blocks[0]) * plan.shareShape[1] + this.column]).toFixed(4)}`;
    const order = plan.order ? ` · place ${plan.places[token]} in the method's order` : "";
    this.said.textContent = `Token ${token} (${where}) sees ${Math.round((100 * count) / all)} % of the video${order}${block}`;
  }

  // Row of the token's block, in both maps.
  markMaps() {
    for (const { canvas } of [this.share, this.mass]) {
      const planned = this.planned && this.plan.order && canvas === this.share.canvas;
      const row = Math.floor((planned ? this.plan.places[this.token] : this.token) / this.plan.blocks[0]);
      const context = canvas.getContext("2d");
      context.putImageData(canvas.still, 0, 0);
      context.fillStyle = "rgb(255 255 255 / 45%)";
      context.fillRect(0, row, canvas.width, 1);
      if (this.column !== undefined && !planned) context.fillRect(this.column, 0, 1, canvas.height);
    }
  }

  buildOverview() {
    const { h } = studio;
    const { card } = this;
    this.choice = h("select", { "aria-label": "Figure", onchange: () => { this.table = this.choice.value; this.paintOverview(); } }, TABLES.map(([name]) => h("option", { value: name }, name)));
    this.heat = h("div", { class: "st-heat" });
    this.explained = h("span", { class: "st-faint" });
    this.heatScale = this.scale();
    this.stepsScale = this.scale();
    const densities = card.densities.map(([step, value]) => h("i", { title: `step ${step}: density ${value.toFixed(3)}`, style: `height:${Math.max(2, 100 * value)}%` }));
    this.steps = h("div", { class: "st-heat" });
    this.overview.replaceChildren(h("section", {}, h("h4", {}, "Layers and heads at this step"), h("div", { class: "st-controls" }, this.choice, this.explained), this.heat, this.heatScale.element),
      h("section", {}, h("h4", {}, "Density over steps and layers"), this.steps, this.stepsScale.element, h("div", { class: "st-spark", role: "img", "aria-label": "Mean density of each step" }, densities), h("p", { class: "st-faint" }, `mean density of steps 0 to ${card.steps - 1}, both guidance branches`)));
  }

  paintOverview() {
    const { card } = this, row = card.measured.indexOf(this.at.step);
    this.explained.textContent = TABLES.find(([name]) => name === this.table)[1];
    const values = card.tables[this.table][row];
    this.cells(this.heat, this.heatScale, "layer", "head", values, [...values.keys()], (layer, head) => layer === this.at.layer && head === this.at.head, (layer, head) => this.go({ layer: this.nearest(layer), head }));
    const mean = (list) => list.reduce((a, b) => a + (b ?? 0), 0) / list.length;
    const density = card.measured.map((_, i) => card.tables.density[i].map(mean));
    this.cells(this.steps, this.stepsScale, "step", "layer", density, card.measured, (step, layer) => step === this.at.step && layer === this.at.layer, (step, layer) => this.go({ step, layer: this.nearest(layer) }));
  }

  // The layer with a map that is nearest to one without.
  nearest(layer) {
    const there = [...new Set(this.card.looks.map((look) => look.layer))];
    return there.reduce((a, b) => (Math.abs(b - layer) < Math.abs(a - layer) ? b : a));
  }

  cells(home, scale, rowName, columnName, values, rows, chosen, onpick) {
    const { h } = studio;
    const flat = values.flat().filter((value) => value !== null), low = Math.min(...flat), high = Math.max(...flat);
    scale.low.textContent = studio.number(low, 3);
    scale.high.textContent = studio.number(high, 3);
    home.style.gridTemplateColumns = `auto repeat(${values[0].length}, minmax(0, 1fr))`;
    home.replaceChildren(h("span", { class: "st-faint" }, `${rowName} \\ ${columnName}`), ...values[0].map((_, column) => h("span", { class: "st-faint" }, String(column))),
      ...values.flatMap((line, i) => [h("span", { class: "st-faint" }, String(rows[i])), ...line.map((value, column) => {
        const [red, green, blue] = colour(high > low ? (value - low) / (high - low) : 1);
        return h("button", { class: chosen(rows[i], column) ? "st-chosen" : "", "aria-label": `${rowName} ${rows[i]}, ${columnName} ${column}: ${studio.number(value, 3)}`, title: `${rowName} ${rows[i]}, ${columnName} ${column}: ${studio.number(value, 3)}`, style: `background:rgb(${red} ${green} ${blue})`, onclick: () => onpick(rows[i], column) });
      })]));
  }
}

customElements.define("studio-inspect", StudioInspect);
