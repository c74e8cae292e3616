// <studio-heat>: a figure of each layer and head at a step, and the density over steps and layers.
"use strict";

const TABLES = [["recall", "share of the attention that the visited blocks hold"], ["best", "the most that as many blocks could hold"], ["density", "share of blocks visited"], ["error", "of the output, against dense"]];

class StudioHeat extends HTMLElement {
  // Set before it is put into the page: card, of a run. Tells "pick" with the step, layer and head
  // that were clicked.
  connectedCallback() {
    this.table = "recall";
    const { h } = studio;
    const { card } = this;
    this.choice = h("select", { "aria-label": "Figure", onchange: () => { this.table = this.choice.value; this.paint(); } }, TABLES.map(([name]) => h("option", { value: name }, name)));
    this.heat = h("div", { class: "st-heat" });
    this.explained = h("span", { class: "st-faint" });
    this.heatScale = this.scale();
    this.stepsScale = this.scale();
    const densities = card.densities.map(([step, value]) => h("i", { title: `step ${step}: density ${value.toFixed(3)}`, style: `height:${Math.max(2, 100 * value)}%` }));
    this.steps = h("div", { class: "st-heat" });
    this.replaceChildren(h("section", {}, h("h4", {}, "Layers and heads at this step"), h("div", { class: "st-controls" }, this.choice, this.explained), this.heat, this.heatScale.element),
      h("section", {}, h("h4", {}, "Density over steps and layers"), this.steps, this.stepsScale.element, h("div", { class: "st-spark", role: "img", "aria-label": "Mean density of each step" }, densities), h("p", { class: "st-faint" }, `mean density of steps 0 to ${card.steps - 1}, both guidance branches`)));
  }

  // What the colours of a heat map run from and to.
  scale() {
    const { h } = studio;
    const low = h("span", {}), high = h("span", {});
    return { low, high, element: h("p", { class: "st-scale" }, low, h("i", {}), high) };
  }

  // at: the step, layer and head that are shown.
  show(at) {
    this.at = { ...at };
    this.paint();
  }

  pick(change) {
    this.dispatchEvent(new CustomEvent("pick", { detail: change }));
  }

  paint() {
    const { card } = this, row = card.measured.indexOf(this.at.step);
    this.explained.textContent = TABLES.find(([name]) => name === this.table)[1];
    const values = card.tables[this.table][row];
    this.cells(this.heat, this.heatScale, "layer", "head", values, [...values.keys()], (layer, head) => layer === this.at.layer && head === this.at.head, (layer, head) => this.pick({ layer: this.nearest(layer), head }));
    const mean = (list) => list.reduce((a, b) => a + (b ?? 0), 0) / list.length;
    const density = card.measured.map((_, i) => card.tables.density[i].map(mean));
    this.cells(this.steps, this.stepsScale, "step", "layer", density, card.measured, (step, layer) => step === this.at.step && layer === this.at.layer, (step, layer) => this.pick({ step, layer: this.nearest(layer) }));
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
        const [red, green, blue] = studio.colour(high > low ? (value - low) / (high - low) : 1);
        return h("button", { class: chosen(rows[i], column) ? "st-chosen" : "", "aria-label": `${rowName} ${rows[i]}, ${columnName} ${column}: ${studio.number(value, 3)}`, title: `${rowName} ${rows[i]}, ${columnName} ${column}: ${studio.number(value, 3)}`, style: `background:rgb(${red} ${green} ${blue})`, onclick: () => onpick(rows[i], column) });
      })]));
  }
}

customElements.define("studio-heat", StudioHeat);
