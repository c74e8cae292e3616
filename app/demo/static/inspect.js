// <studio-inspect>: a layer and head at a step: its maps, and what the token under the mouse sees of
// the video.
"use strict";

class StudioInspect extends HTMLElement {
  async connectedCallback() {
    const { h } = studio;
    const { card } = this;
    this.files = new Map();
    this.at = { step: card.measured.at(-1), layer: card.looks.at(-1)?.layer ?? 0, head: 0 };
    this.token = this.middle();
    const select = (label, values) => h("select", { "aria-label": label, onchange: (event) => this.go({ [label.toLowerCase()]: Number(event.target.value) }) }, values.map((value) => h("option", { value: String(value) }, String(value))));
    this.selects = { step: select("Step", card.measured), layer: select("Layer", [...new Set(card.looks.map((look) => look.layer))]), head: select("Head", [...Array(card.heads).keys()]) };
    this.numbers = h("p", { class: "st-faint st-numbers", role: "status" });
    this.maps = h("studio-maps", { onlook: (event) => this.look(event.detail.token ?? this.token, event.detail.column) });
    this.frames = h("div", { class: "st-frames", tabindex: "0", role: "group", "aria-label": "Tokens of the video: arrow keys choose one, Page Up and Down change the frame", onkeydown: (event) => this.key(event) });
    this.said = h("p", { class: "st-faint", role: "status" });
    this.mode = h("div", { class: "st-segments", role: "group", "aria-label": "What the frames show" }, [["sees", "What a token sees"], ["order", "Order of the tokens"]].map(([mode, title]) => h("button", { "data-mode": mode, onclick: () => { this.showing = mode; this.paintFrames(); } }, title)));
    this.showing = "sees";
    this.heat = Object.assign(h("studio-heat", { class: "st-overview", onpick: (event) => this.go(event.detail) }), { card });
    this.ordered = card.looks.some((look) => look.heads.some((head) => head.ordered));
    this.replaceChildren(h("div", { class: "st-card" }, h("h3", {}, card.prompt), h("p", { class: "st-faint" }, studio.facts(card)), this.used(),
      h("div", { class: "st-controls" }, Object.entries(this.selects).map(([name, field]) => h("label", {}, name, field))), this.numbers,
      this.maps,
      h("div", { class: "st-views" }, this.mode, this.said), this.frames, this.heat));
    this.pictures = await this.decode();
    this.build();
    await this.go({});
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
    const fields = Object.entries(method.fields).filter(([, value]) => value !== null).map(([field, value]) => `${field.replaceAll("_", " ")} ${field === "calibration" ? value.split("/").at(-1) : value}`);
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
      this.plan = studio.openPlan(buffer, entry);
    } catch (error) {
      this.numbers.textContent = error.message;
      return;
    }
    const row = this.card.measured.indexOf(step), value = (name) => this.card.tables[name][row][layer][head];
    this.numbers.textContent = `density ${studio.number(value("density"), 3)} · recall ${studio.number(value("recall"), 3)} of at most ${studio.number(value("best"), 3)} with as many blocks · output error ${studio.number(value("error"), 3)}` + (look.why ? ` · dense here (${look.why.replaceAll("_", " ")})` : "");
    this.maps.set(this.plan, this.ordered);
    this.paintFrames();
    this.heat.show(this.at);
    this.dataset.ready = "yes";
  }

  async read(file) {
    if (!this.files.has(file)) this.files.set(file, fetch(studio.file(this.card.name, file)).then((answer) => { if (!answer.ok) throw new Error("The maps of this run are not there any more."); return answer.arrayBuffer(); }));
    return this.files.get(file);
  }

  // column: of the blocks in the maps, if the token was chosen there.
  look(token, column) {
    this.token = token;
    this.maps.column = column;
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
        image.data.set(this.showing === "order" ? [...studio.colour(this.plan.places[token] / this.plan.places.length), 215] : seen ? [45, 212, 191, 40] : [8, 12, 16, 190], 4 * i);
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
    this.maps.mark(this.token);
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
    const order = plan.order ? ` · place ${plan.places[token]} in the method's order` : "";
    this.said.textContent = `Token ${token} (${where}) sees ${Math.round((100 * count) / all)} % of the video${order}${this.maps.pair(token)}`;
  }
}

customElements.define("studio-inspect", StudioInspect);
