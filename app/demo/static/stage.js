// <studio-stage kind>: the run of a tab, from the queue to its result. It finds its run again after
// a reload.
"use strict";

const EMPTY = {
  generate: ["Nothing made yet", "Write what it shows, choose a method and press Generate."],
  compare: ["Nothing compared yet", "Choose up to three methods: each starts from the same noise as dense attention."],
  inspect: ["Nothing to look into yet", "A run with a method shows which blocks each layer and head keeps, and what it misses."],
  bench: ["Nothing measured yet", "The kernels of this machine, timed after each was checked."],
};
const POLL = 400;

class StudioStage extends HTMLElement {
  async connectedCallback() {
    this.kind = this.getAttribute("kind");
    this.empty();
    studio.on("open", (card) => card.kind === this.kind && this.result(card));
    studio.on("removed", (name) => name === this.shown && this.empty());
    if (studio.wanted[this.kind]) this.result(studio.wanted[this.kind]);
    else await this.find();
  }

  // The run that goes on, or the last that ended, unless the user has asked for another meanwhile.
  async find() {
    const asked = () => this.name || this.shown;
    try {
      const running = (await studio.get("jobs")).filter((job) => job.kind === this.kind);
      if (asked()) return;
      if (running.length) return this.follow(running.at(-1).name);
      const last = (await studio.get("runs")).find((run) => run.kind === this.kind);
      const card = last && (await studio.get(`runs/${last.name}`));
      if (card && !asked()) this.result(card);
    } catch (error) {
      if (!asked()) this.failed(error.message);
    }
  }

  empty() {
    const [title, text] = EMPTY[this.kind];
    this.shown = null;
    this.replaceChildren(studio.h("div", { class: "st-card st-empty" }, studio.h("h3", {}, title), studio.h("p", {}, text)));
  }

  // What Gradio's submit gave: the name of a job, or why there is none.
  answer(content) {
    if (content.error) this.failed(content.error);
    else this.follow(content.name);
  }

  failed(words) {
    this.name = null;
    this.replaceChildren(studio.h("div", { class: "st-card st-failed", role: "alert" }, studio.h("h3", {}, "That did not work"), studio.h("p", {}, words)));
  }

  async follow(name) {
    this.name = name;
    this.live = null;
    while (this.name === name && this.isConnected) {
      let job;
      try {
        job = await studio.get(`jobs/${name}`);
        this.silent = 0;
      } catch (error) {
        // A run is not lost because one question was.
        if (error.status || (this.silent = (this.silent ?? 0) + 1) > 20) return this.failed(error.message);
        await new Promise((done) => setTimeout(done, 3 * POLL));
        continue;
      }
      if (this.name !== name) return;
      if (job.state === "failed") return this.failed(job.error);
      if (job.state === "cancelled") return this.cancelled(job);
      if (job.state === "finished") {
        this.name = null;
        studio.tell("finished", name);
        return this.result(await studio.get(`runs/${name}`));
      }
      this.progress(job);
      await new Promise((done) => setTimeout(done, POLL));
    }
  }

  progress(job) {
    if (!this.live) {
      this.live = new Live(() => this.cancel());
      this.replaceChildren(this.live.element);
    }
    this.live.show(job);
  }

  async cancel() {
    if (!this.name) return;
    this.live?.stopping();
    await studio.post(`jobs/${this.name}/cancel`).catch((error) => studio.say(error.message));
  }

  cancelled(job) {
    this.name = null;
    const words = job.doing === "cancelled" ? "The run was stopped, and its memory is free again." : `The run was ${job.doing}.`;
    this.replaceChildren(studio.h("div", { class: "st-card st-empty" }, studio.h("h3", {}, "Cancelled"), studio.h("p", {}, words)));
  }

  result(card) {
    this.name = null;
    this.shown = card.name;
    const results = document.createElement(card.kind === "inspect" ? "studio-inspect" : card.kind === "bench" ? "studio-bench" : "studio-results");
    results.card = card;
    this.replaceChildren(results);
  }
}

// A run that goes on: bar, step, seconds left, and the video that the step expects.
class Live {
  constructor(oncancel) {
    const { h } = studio;
    this.canvas = h("canvas", { class: "st-preview", hidden: true, "aria-label": "What this step expects of the video" });
    this.title = h("h3", {});
    this.step = h("p", { class: "st-step", role: "status" });
    this.bar = h("div", { class: "st-bar" }, h("i"));
    this.stop = h("button", { class: "st-button st-cancel", onclick: oncancel }, "Cancel");
    this.element = h("div", { class: "st-card st-live" }, this.canvas, h("div", { class: "st-live-side" }, this.title, this.step, this.bar,
      h("div", { class: "st-live-foot" }, this.stop, h("span", { class: "st-faint" }, "Closing this page stops the run after two minutes."))));
    this.frame = 0;
    this.timer = setInterval(() => this.element.isConnected ? this.draw() : clearInterval(this.timer), 140);
  }

  show(job) {
    this.title.textContent = job.state === "waiting" ? "In the queue" : job.doing;
    const left = job.seconds_left === null ? "" : ` · about ${studio.seconds(job.seconds_left)} left`;
    this.step.textContent = job.state === "waiting" ? `${job.before} before this one` : job.total ? `step ${job.done} of ${job.total}${left}` : "a moment";
    this.bar.classList.toggle("st-busy", !job.total);
    this.bar.firstChild.style.width = job.total ? `${(100 * job.done) / job.total}%` : "";
    if (!job.preview) {
      this.url = this.image = null;
      this.canvas.hidden = true;
    } else if (job.preview.url !== this.url) {
      this.url = job.preview.url;
      const image = new Image();
      const order = this.asked = (this.asked ?? 0) + 1;
      // Where steps come faster than pictures load, each is late, and still the newest there is.
      image.onload = () => { if (!this.url || order < this.drawn) return; Object.assign(this, { image, size: job.preview, drawn: order }); this.canvas.hidden = false; this.draw(); };
      image.src = this.url;
    }
  }

  draw() {
    if (!this.image) return;
    const { frames, height, width } = this.size;
    const scale = Math.ceil(320 / width);
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    const context = this.canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(this.image, (this.frame++ % frames) * width, 0, width, height, 0, 0, this.canvas.width, this.canvas.height);
  }

  stopping() {
    this.stop.disabled = true;
    this.stop.textContent = "Stopping";
  }
}

customElements.define("studio-stage", StudioStage);
