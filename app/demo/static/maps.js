// <studio-maps>: of one layer and head at a step, which blocks are visited and where the exact
// attention is, both in one order: the method's own where it has one, else that of the video.
"use strict";

const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // viridis
const ORDERS = { method: "in the method's order", video: "in the order of the video" };

studio.colour = (share) => {
  const at = Math.min(0.9999, Math.max(0, share)) * (RAMP.length - 1), i = Math.floor(at);
  return RAMP[i].map((x, channel) => Math.round(x + (RAMP[i + 1][channel] - x) * (at - i)));
};

function half(bits) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : (2 ** -14 * fraction) / 1024;
}

// A head's entry of a look, with what the look's file holds of it. Runs of earlier versions have no
// `ordered`, and are shown in the order of the video.
studio.openPlan = (buffer, entry) => {
  const part = (place, Kind) => place && new Kind(buffer, place[0], place.slice(1).reduce((a, b) => a * b, 1));
  const plan = { ...entry, keepShape: entry.keep.slice(1), shareShape: entry.share.slice(1), keep: part(entry.keep, Uint8Array), share: part(entry.share, Uint8Array), mass: part(entry.mass, Uint16Array), ordered: part(entry.ordered, Uint16Array), order: part(entry.order, Int32Array) };
  plan.places = new Int32Array(plan.tokens);
  if (plan.order) plan.order.forEach((token, place) => { if (token >= 0) plan.places[token] = place; });
  else plan.places.forEach((_, token) => { plan.places[token] = token; });
  return plan;
};

class StudioMaps extends HTMLElement {
  connectedCallback() {
    const { h } = studio;
    this.wanted = "method";
    this.share = this.map("Visited blocks", ["left out", "visited"]);
    this.mass = this.map("Exact attention of each block", ["none", "most, logarithmic"]);
    this.orders = h("div", { class: "st-segments", role: "group", "aria-label": "Order of both maps" }, [["method", "The method's order"], ["video", "The video's order"]].map(([order, title]) =>
      h("button", { "data-order": order, onclick: () => this.turn(order) }, title)));
    this.why = h("span", { class: "st-faint" }, "This head keeps the order of the video.");
    this.choice = h("div", { class: "st-views", hidden: "" }, this.orders, this.why);
    this.replaceChildren(this.choice, h("div", { class: "st-maps" }, this.share.element, this.mass.element));
  }

  map(title, [low, high]) {
    const { h } = studio;
    const canvas = h("canvas", { class: "st-map", role: "img", "aria-label": title }), order = h("span", { class: "st-faint" });
    canvas.addEventListener("pointermove", (event) => this.hover(event, canvas));
    canvas.addEventListener("pointerdown", (event) => this.hover(event, canvas));
    return { title, canvas, order, element: h("figure", {}, h("figcaption", {}, title, order), canvas, h("p", { class: "st-scale" }, low, h("i", {}), high)) };
  }

  // plan: of a head; choose: whether some heads of the run have an order of their own.
  set(plan, choose) {
    this.plan = plan;
    this.column = undefined;
    this.choice.hidden = !choose;
    this.paint();
  }

  turn(order) {
    this.wanted = order;
    this.paint();
    this.tell({});
  }

  // Whether the maps are in an order that is not the video's.
  get planned() {
    return Boolean(this.wanted === "method" && this.plan.ordered);
  }

  // Exact attention of the blocks, in the order that is shown, and how many there are.
  get exact() {
    return this.planned ? this.plan.ordered : this.plan.mass;
  }

  get shape() {
    return this.planned ? this.plan.keepShape : this.plan.shareShape;
  }

  // The row of blocks that a token is in.
  rowOf(token) {
    return Math.floor((this.planned ? this.plan.places[token] : token) / this.plan.blocks[0]);
  }

  paint() {
    const { planned, exact, plan, shape: [rows, columns] } = this;
    for (const button of this.orders.children) {
      button.disabled = !plan.ordered;
      button.setAttribute("aria-pressed", String((button.dataset.order === "method") === planned));
    }
    this.why.hidden = Boolean(plan.order);
    for (const { title, canvas, order } of [this.share, this.mass]) {
      order.textContent = planned ? ORDERS.method : ORDERS.video;
      canvas.setAttribute("aria-label", `${title}, ${order.textContent}`);
    }
    const count = Math.min(rows * columns, 4096);
    const most = Math.log2(1 + Math.max(...Array.from({ length: count }, (_, i) => half(exact[Math.floor((i * rows * columns) / count)]))) * columns);
    this.fill(this.share.canvas, (i) => studio.colour(planned ? plan.keep[i] : plan.share[i] / 255));
    // Logarithmic: most of the attention is in few blocks.
    this.fill(this.mass.canvas, (i) => studio.colour(Math.log2(1 + half(exact[i]) * columns) / most));
  }

  fill(canvas, colourOf) {
    const [rows, columns] = this.shape, image = new ImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) image.data.set([...colourOf(i), 255], 4 * i);
    canvas.width = columns;
    canvas.height = rows;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.still = image;
  }

  // A pair of blocks under the mouse: its first query becomes the token.
  hover(event, canvas) {
    if (!this.plan) return;
    const { plan, shape: [rows, columns] } = this, box = canvas.getBoundingClientRect();
    const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
    const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
    const first = row * plan.blocks[0];
    this.tell({ token: this.planned ? Math.max(0, plan.order[first]) : Math.min(first, plan.tokens - 1), column });
  }

  // What is to be marked: without a token the former one, without a column none.
  tell(place) {
    this.dispatchEvent(new CustomEvent("look", { detail: place }));
  }

  // Row of the token's block, in both maps, and the column under the mouse.
  mark(token) {
    const row = this.rowOf(token);
    for (const { canvas } of [this.share, this.mass]) {
      const context = canvas.getContext("2d");
      context.putImageData(canvas.still, 0, 0);
      context.fillStyle = "rgb(255 255 255 / 45%)";
      context.fillRect(0, row, canvas.width, 1);
      if (this.column !== undefined) context.fillRect(this.column, 0, 1, canvas.height);
    }
  }

  // What the two blocks have of the attention, in words.
  pair(token) {
    if (this.column === undefined) return "";
    const row = this.rowOf(token), mass = half(this.exact[row * this.shape[1] + this.column]);
    return ` · blocks ${row} and ${this.column}: attention ${mass.toFixed(4)}`;
  }
}

customElements.define("studio-maps", StudioMaps);
