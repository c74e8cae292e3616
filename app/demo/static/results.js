// <studio-results>: a finished run or comparison: the player, the figures, and how to repeat it.
"use strict";

const COLUMNS = [
  ["density", "share of key blocks that were computed", (run) => studio.number(run.density, 3)],
  ["seconds", "of denoising", (run) => studio.number(run.denoise_seconds, run.denoise_seconds >= 10 ? 1 : 2)],
  ["speed-up", "against dense, same machine", (run) => (run.reference ? "1" : studio.number(run.speedup, 2, "x"))],
  ["PSNR dB", "against dense, on raw frames", (run) => (run.reference ? "–" : studio.number(run.psnr, 2))],
  ["SSIM", "against dense, on raw frames", (run) => (run.reference ? "–" : studio.number(run.ssim, 4))],
  ["VMAF", "against dense, on raw frames", (run) => (run.reference ? "–" : studio.number(run.vmaf, 1))],
];

class StudioResults extends HTMLElement {
  connectedCallback() {
    const { h } = studio;
    const { card } = this;
    const player = document.createElement("studio-player");
    const tracks = card.runs.map((run) => ({ title: run.name, url: studio.file(card.name, run.file) }));
    const compared = card.runs.length > 1;
    this.replaceChildren(h("div", { class: "st-card" },
      h("h3", {}, card.prompt), h("p", { class: "st-faint" }, studio.facts(card)), player,
      this.table(card.runs, compared), this.downloads(card), this.repeat(card)));
    player.set(tracks, { frames: card.frames, fps: card.fps, height: card.height, width: card.width });
  }

  table(runs, compared) {
    const { h } = studio;
    // VMAF is a model of videos.
    const all = this.card.frames > 1 ? COLUMNS : COLUMNS.filter(([name]) => name !== "VMAF");
    const columns = compared ? all : all.slice(0, 2);
    return h("div", { class: "st-scroll" }, h("table", { class: "st-table" },
      h("thead", {}, h("tr", {}, h("th", {}, "run"), columns.map(([name, help]) => h("th", { title: help }, name)))),
      h("tbody", {}, runs.map((run) => h("tr", {}, h("th", {}, run.name, run.label !== run.name ? h("span", { class: "st-faint" }, run.label) : null, run.backend ? h("span", { class: "st-faint" }, `${run.backend} kernel`) : null),
        columns.map(([, , value]) => h("td", {}, value(run))))))));
  }

  downloads(card) {
    const { h } = studio;
    const link = (name, text) => h("a", { class: "st-chip", href: studio.file(card.name, name), download: name }, text);
    return h("div", { class: "st-downloads" }, card.files.map((name) => link(name, { "report.json": "figures (JSON)", "side_by_side.mp4": "side by side", "side_by_side.png": "side by side", "contact_sheet.png": "contact sheet" }[name] ?? name)));
  }

  repeat(card) {
    const { h } = studio;
    const block = (title, text) => h("details", { class: "st-code" }, h("summary", {}, title),
      h("div", {}, h("button", { class: "st-plain", onclick: () => studio.copy(text) }, "copy"), h("pre", {}, text)));
    return h("div", {}, block("Command line", card.command), block("Python", card.script));
  }
}

customElements.define("studio-results", StudioResults);
