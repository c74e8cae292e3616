// <studio-bench-form>: what to measure; <studio-bench>: the rows as bars, and what each backend says.
"use strict";

class StudioBenchForm extends HTMLElement {
  async connectedCallback() {
    const { h } = studio;
    try {
      this.bench = (await studio.known()).bench;
    } catch (error) {
      this.replaceChildren(h("p", { class: "st-card st-error", role: "alert" }, error.message));
      return;
    }
    const select = (label, values, titles = values) => h("select", { "aria-label": label }, values.map((value, i) => h("option", { value: String(value) }, String(titles[i]))));
    this.what = select("What", ["kernels", "model"], ["attention kernels", "a whole forward"]);
    this.what.addEventListener("change", () => this.fill());
    this.of = select("Of", []);
    this.density = select("Density", this.bench.density);
    this.density.value = "0.25";
    const boxes = this.bench.methods.map((name) => h("label", { class: "st-check" }, h("input", { type: "checkbox", value: name, checked: name === "radial" }), name));
    this.methods = h("div", { class: "st-checks", role: "group", "aria-label": "Methods" }, boxes);
    this.replaceChildren(h("div", { class: "st-card" },
      h("p", { class: "st-about" }, "Each kernel is compared with exact attention before it is timed. Random weights and inputs: time depends on sizes alone."),
      h("div", { class: "st-controls" }, h("label", {}, "measure", this.what), h("label", {}, "of", this.of), h("label", {}, "density", this.density)),
      h("p", { class: "st-about" }, "With the masks of"), this.methods));
    this.fill();
  }

  fill() {
    this.of.replaceChildren(...this.bench[this.what.value].map((name) => studio.h("option", { value: name }, name)));
  }

  form() {
    if (!this.bench) return {};
    const methods = [...this.methods.querySelectorAll("input:checked")].map((box) => box.value);
    return { what: this.what.value, of: this.of.value, density: Number(this.density.value), methods };
  }
}

class StudioBench extends HTMLElement {
  connectedCallback() {
    const { h } = studio;
    const { card } = this;
    const facts = Object.entries(card.facts).map(([name, value]) => `${name} ${value}`).join(" · ");
    this.replaceChildren(h("div", { class: "st-card" }, h("h3", {}, card.prompt), h("p", { class: "st-faint" }, facts),
      card.what === "kernels" ? this.kernels(card.rows) : this.model(card.rows),
      h("div", { class: "st-downloads" }, card.files.map((name) => h("a", { class: "st-chip", href: studio.file(card.name, name), download: name }, "rows (JSON)"))),
      this.machine(card.checks)));
  }

  // Rows by mask. A CPU times dense attention anew with each mask, among its rows; a GPU once, first.
  groups(rows) {
    const onCpu = this.card.facts.machine.includes("threads");
    const groups = [];
    for (const row of rows) {
      const title = row.pattern === "dense" ? (onCpu ? null : "dense") : `${row.pattern}, density ${studio.number(row.density, 2)}`;
      let group = groups.at(-1);
      const other = title !== null && group?.title && group.title !== title;
      if (!group || other || group.rows.some((one) => one.kernel === row.kernel)) groups.push((group = { title: null, rows: [] }));
      group.title ??= title;
      group.rows.push(row);
    }
    return groups;
  }

  kernels(rows) {
    const { h } = studio;
    const most = Math.max(...rows.map((row) => row.ms ?? 0));
    return this.groups(rows).map(({ title: name, rows: group }) => h("section", { class: "st-chart" }, h("h4", {}, name ?? "dense"), group.map((row) =>
      this.bar(row.kernel, row.ms === null ? null : [[row.ms / most, row.pattern === "dense" ? "st-dense" : "st-sparse"]],
        row.ms === null ? row.note : `${studio.number(row.ms, row.ms < 10 ? 2 : 0)} ms · ${studio.number(row.tflops, row.tflops < 10 ? 2 : 0)} TFLOP/s · error ${row.error?.toExponential(1) ?? "–"}`))));
  }

  model(rows) {
    const { h } = studio;
    const most = Math.max(...rows.map((row) => row.ms ?? 0));
    return [h("p", { class: "st-legend" }, h("i", { class: "st-attention" }), "attention ", h("i", { class: "st-plan" }), "of that, planning ", h("i", { class: "st-rest" }), "all else"),
      h("section", { class: "st-chart" }, rows.map((row) => this.bar(row.name, row.ms === null ? null : this.parts(row, most),
        row.ms === null ? row.error : `${studio.number(row.ms, 0)} ms · ${studio.number(row.speedup, 2)}x of at most ${studio.number(row.bound, 2)}x`)))];
  }

  parts(row, most) {
    const attention = Math.min(row.attention ?? 0, row.ms), plan = Math.min(row.plan ?? 0, attention);
    return [[(attention - plan) / most, "st-attention"], [plan / most, "st-plan"], [(row.ms - attention) / most, "st-rest"]];
  }

  bar(name, parts, text) {
    const { h } = studio;
    return h("div", { class: "st-row" }, h("span", { class: "st-row-name" }, name),
      h("span", { class: "st-row-bar" }, (parts ?? []).map(([share, kind]) => h("i", { class: kind, style: `width:${100 * share}%` }))),
      h("span", { class: parts ? "st-row-text" : "st-row-text st-faint" }, parts ? text : `does not run: ${text}`));
  }

  machine(checks) {
    const { h } = studio;
    const marks = { true: "yes", false: "no", null: "" };
    return h("details", { class: "st-code", open: true }, h("summary", {}, "This machine, and what each backend says"), h("div", { class: "st-scroll" },
      h("table", { class: "st-table st-left" }, h("tbody", {}, checks.filter((check) => check.section !== "versions").map((check) =>
        h("tr", {}, h("th", {}, check.name), h("td", { class: check.ok === false ? "st-error" : "" }, marks[check.ok]), h("td", {}, check.detail)))))));
  }
}

customElements.define("studio-bench-form", StudioBenchForm);
customElements.define("studio-bench", StudioBench);
