// <studio-gallery>: the user's finished runs; they are on the server's disk, so a reload keeps them.
"use strict";

class StudioGallery extends HTMLElement {
  connectedCallback() {
    studio.on("finished", () => this.read());
    this.read();
  }

  async read() {
    const { h } = studio;
    let runs;
    try {
      runs = await studio.get("runs");
    } catch (error) {
      this.replaceChildren(h("p", { class: "st-error" }, error.message));
      return;
    }
    const list = runs.length ? h("div", { class: "st-gallery" }, runs.map((run) => this.tile(run))) : h("p", { class: "st-faint" }, "What you make stays here, in this browser's name, also after a reload.");
    this.replaceChildren(h("h2", {}, "Your runs"), list);
  }

  tile(run) {
    const { h } = studio;
    const when = new Date(run.at * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
    const open = async () => {
      try {
        const card = await studio.get(`runs/${run.name}`);
        studio.open(card);
        document.querySelector("#tabs")?.scrollIntoView({ behavior: "smooth" });
      } catch (error) {
        studio.say(error.message);
      }
    };
    const remove = async () => {
      await studio.post(`runs/${run.name}/delete`).catch((error) => studio.say(error.message));
      studio.tell("removed", run.name);
      this.read();
    };
    return h("div", { class: "st-tile" },
      h("button", { class: "st-open", onclick: open, title: run.prompt },
        run.picture ? h("img", { src: studio.file(run.name, run.picture), alt: "", loading: "lazy" }) : h("span", { class: "st-no-picture", "aria-hidden": "true" }, TITLES[run.kind]),
        h("span", { class: "st-tile-title" }, run.prompt), h("span", { class: "st-faint" }, `${run.labels.join(", ")} · ${when}`)),
      h("button", { class: "st-icon st-remove", "aria-label": "Delete this run", title: "Delete", onclick: remove }, "×"));
  }
}

customElements.define("studio-gallery", StudioGallery);
