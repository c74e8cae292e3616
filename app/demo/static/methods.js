// <studio-methods kind most>: the methods of a run, each with the fields of its dataclass.
"use strict";

const FEW = 10; // steps of a model for which presets "-few-steps" are meant, at most

class StudioMethods extends HTMLElement {
  async connectedCallback() {
    this.most = Number(this.getAttribute("most"));
    this.list = studio.h("div", { class: "st-methods" });
    this.more = studio.h("button", { class: "st-button st-add", onclick: () => this.add() }, "+ Add a method");
    this.replaceChildren(this.list, this.more, this.getAttribute("kind") === "inspect" ? this.maps() : "");
    try {
      this.forms = await studio.known();
    } catch (error) {
      this.list.replaceChildren(studio.h("p", { class: "st-card st-error", role: "alert" }, `${error.message} Reload the page when it runs again.`));
      this.more.hidden = true;
      return;
    }
    this.own = this.refused = [];
    studio.on("model", (name) => this.fit(name));
    await this.fit(studio.chosen);
  }

  // The presets of a model; the first becomes the choice.
  async fit(model) {
    if (model === this.model) return;
    this.model = model;
    const about = await studio.get(`model?name=${encodeURIComponent(model ?? "")}`).catch(() => ({ presets: [] }));
    if (this.model !== model) return;
    this.own = about.presets;
    this.refused = about.refused ?? [];
    this.steps = about.defaults?.num_inference_steps ?? 50;
    const wanted = this.most > 1 ? Math.min(2, this.most) : 1;
    this.list.replaceChildren();
    for (let i = 0; i < wanted; i++) this.add();
    this.dataset.model = model;
  }

  add() {
    const taken = [...this.list.children].map((one) => one.choice);
    // Calibrations are for one size, and few steps are few: what suits any run is offered first.
    const calibrated = (name) => this.forms.methods.find((one) => one.name === (this.forms.presets[name]?.method ?? name)).calibrated;
    const forms = { ...this.forms, methods: this.forms.methods.filter((one) => !this.refused.includes(one.name)) };
    const late = (name) => calibrated(name) || (name.endsWith("-few-steps") && this.steps > FEW);
    const all = [...this.own, ...forms.methods.map((one) => one.name)].filter((name) => !taken.includes(name));
    const name = all.sort((a, b) => late(a) - late(b))[0] ?? "dense";
    const one = document.createElement("studio-method");
    one.set(forms, this.own, name, this.most > 1 && (() => { one.remove(); this.count(); }));
    this.list.append(one);
    this.count();
  }

  count() {
    this.more.hidden = this.list.children.length >= this.most;
    this.list.classList.toggle("st-alone", this.list.children.length < 2);
  }

  // Runs as texts that `--compare` takes; a comparison has dense attention too.
  form() {
    const own = [...(this.list?.children ?? [])].map((one) => one.text());
    if (this.counts) return { runs: own, maps_steps: Number(this.counts[0].value), maps_layers: Number(this.counts[1].value) };
    return { runs: this.most > 1 ? ["dense", ...own.filter((text) => text !== "dense")] : own };
  }

  // Of how many steps and layers Look inside keeps maps.
  maps() {
    const { h } = studio;
    const count = (label, value) => h("select", { "aria-label": label }, [1, 2, 3, 4, 6, 8].map((n) => h("option", { value: String(n), selected: n === value }, String(n))));
    this.counts = [count("Steps to look at", 3), count("Layers to look at", 4)];
    return h("div", { class: "st-card st-controls" }, h("label", {}, "maps of", this.counts[0], "steps"), h("label", {}, "and", this.counts[1], "layers, spread over the run; figures of all layers"));
  }
}

class StudioMethod extends HTMLElement {
  set(forms, presets, choice, onremove) {
    Object.assign(this, { forms, presets, onremove });
    this.choose(choice);
  }

  choose(choice) {
    const { h } = studio;
    this.choice = choice;
    const preset = this.forms.presets[choice];
    const method = this.forms.methods.find((one) => one.name === (preset?.method ?? choice));
    const select = h("select", { "aria-label": "Method or preset", onchange: (event) => this.choose(event.target.value) },
      this.presets.length ? h("optgroup", { label: "Presets of this model" }, this.presets.map((name) => h("option", { value: name }, name))) : null,
      h("optgroup", { label: "Methods" }, this.forms.methods.map((one) => h("option", { value: one.name }, one.title))),
      this.onremove ? null : h("optgroup", { label: "Reference" }, h("option", { value: "dense" }, "Dense attention")));
    select.value = choice;
    const reset = h("button", { class: "st-plain st-reset", hidden: true, onclick: () => this.choose(choice) }, "reset");
    const head = h("div", { class: "st-method-head" }, select, reset,
      this.onremove ? h("button", { class: "st-icon st-remove", "aria-label": "Remove this method", title: "Remove", onclick: this.onremove }, "×") : null);
    this.fields = method ? method.fields.map((field) => new Field(field, preset?.fields[field.name] ?? field.default, () => { reset.hidden = !this.changed().length; })) : [];
    const rare = this.fields.filter((field) => field.about.rare);
    this.replaceChildren(head, ...(method ? [
      h("p", { class: "st-about" }, method.about, method.source ? h("span", { class: "st-source" }, ` ${method.source}.`) : null,
        method.calibrated ? " Needs a calibration for the model and size: the bundled model brings its own, others go under More." : null),
      h("details", { class: "st-fields" }, h("summary", {}, `${this.fields.length} settings`),
        h("div", { class: "st-grid" }, this.fields.filter((field) => !field.about.rare).map((field) => field.element)),
        rare.length ? h("details", { class: "st-rare" }, h("summary", {}, "rarely changed"), h("div", { class: "st-grid" }, rare.map((field) => field.element))) : null),
    ] : [h("p", { class: "st-about" }, "Diffusers' own attention: what the others are measured against.")]));
  }

  changed() {
    return this.fields.filter((field) => field.value() !== field.start);
  }

  text() {
    const changed = this.changed().map((field) => `${field.about.name}=${field.value()}`);
    return this.choice + (changed.length ? `:${changed.join(",")}` : "");
  }
}

class Field {
  constructor(about, start, onchange) {
    const { h } = studio;
    Object.assign(this, { about, start });
    const name = { "aria-label": about.name };
    if (about.kind === "switch") {
      this.input = h("input", { ...name, type: "checkbox", checked: start === "true", onchange });
    } else if (about.kind === "choice") {
      this.input = h("select", { ...name, onchange }, about.choices.map((word) => h("option", { value: word }, word)));
      this.input.value = start;
    } else if (about.kind === "slider") {
      this.input = h("input", { ...name, type: "number", value: start, step: "any", oninput: () => { this.range.value = this.input.value; onchange(); } });
      this.range = h("input", { type: "range", min: String(about.low), max: String(about.high), step: String(about.step), value: start, tabindex: "-1", "aria-hidden": "true",
        oninput: () => { this.input.value = this.range.value; onchange(); } });
    } else {
      this.input = h("input", { ...name, type: "text", value: start, placeholder: about.hint, title: about.hint, oninput: onchange });
    }
    this.element = h("label", { class: `st-field st-${about.kind}` }, h("span", { class: "st-name" }, about.name.replaceAll("_", " ")),
      h("span", { class: "st-control" }, this.range ?? null, this.input),
      about.help ? h("span", { class: "st-help", title: about.help }, about.help) : null);
  }

  value() {
    if (this.about.kind === "switch") return String(this.input.checked);
    return this.input.value.trim() || this.start;
  }
}

customElements.define("studio-methods", StudioMethods);
customElements.define("studio-method", StudioMethod);
