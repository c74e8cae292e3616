// <studio-player>: several videos of one length as one: they play, scrub and step together, frame by
// frame, beside each other, behind a wipe, or as an amplified difference. Images are of one frame.
"use strict";

const MEMORY = 400e6; // bytes of decoded frames; larger videos are shown smaller

class StudioPlayer extends HTMLElement {
  // tracks: [{title, url}], and the frames, fps, height and width of all of them.
  set(tracks, about) {
    Object.assign(this, { tracks, ...about, frame: 0, playing: false, view: "side", a: 0, b: Math.min(1, tracks.length - 1), wipe: 0.5, gain: 8 });
    this.bitmaps = tracks.map(() => []);
    this.build();
    this.read();
  }

  build() {
    const { h } = studio;
    this.screens = h("div", { class: "st-screens" });
    this.playButton = h("button", { class: "st-icon st-play", "aria-label": "Play or pause", title: "Play or pause (space)", onclick: () => this.play(!this.playing) }, "▶");
    this.slider = h("input", { type: "range", class: "st-scrub", min: "0", max: String(this.frames - 1), value: "0", "aria-label": "Frame", oninput: () => { this.play(false); this.show(Number(this.slider.value)); } });
    this.counter = h("span", { class: "st-counter" });
    const step = (by, label, sign) => h("button", { class: "st-icon", "aria-label": label, title: label, onclick: () => this.step(by) }, sign);
    this.views = h("div", { class: "st-segments", role: "group", "aria-label": "View" }, [["side", "Side by side"], ["wipe", "Wipe"], ["difference", "Difference"]].map(([view, title]) =>
      h("button", { "data-view": view, onclick: () => this.setView(view) }, title)));
    const pick = (side) => h("select", { "aria-label": `${side === "a" ? "First" : "Second"} ${this.frames > 1 ? "video" : "image"}`, onchange: (event) => { this[side] = Number(event.target.value); this.layout(); } },
      this.tracks.map((track, i) => h("option", { value: String(i) }, track.title)));
    this.pickA = pick("a"); this.pickB = pick("b");
    this.pickA.value = this.a; this.pickB.value = this.b;
    this.gainInput = h("input", { type: "range", min: "1", max: "32", value: String(this.gain), "aria-label": "Amplification", oninput: () => { this.gain = Number(this.gainInput.value); this.gainSaid.textContent = `${this.gain}x`; this.draw(); } });
    this.gainSaid = h("span", { class: "st-counter" }, `${this.gain}x`);
    this.pairs = h("div", { class: "st-pairs" }, this.pickA, h("span", { class: "st-faint" }, "and"), this.pickB, h("label", { class: "st-gain" }, "amplified", this.gainInput, this.gainSaid));
    const several = this.tracks.length > 1;
    this.replaceChildren(several ? h("div", { class: "st-views" }, this.views, this.pairs) : "", this.screens,
      this.frames > 1 ? h("div", { class: "st-transport" }, this.playButton, step(-1, "One frame back", "‹"), step(1, "One frame on", "›"), this.slider, this.counter) : "");
    this.layout();
  }

  setView(view) {
    this.view = view;
    this.layout();
  }

  layout() {
    const { h } = studio;
    for (const button of this.views.children) button.setAttribute("aria-pressed", String(button.dataset.view === this.view));
    this.pairs.hidden = this.view === "side";
    this.pairs.lastChild.hidden = this.view !== "difference";
    const screen = (title, hint) => {
      const canvas = h("canvas", { width: this.width, height: this.height, role: "img", "aria-label": title });
      return { canvas, element: h("figure", {}, h("figcaption", {}, title, hint ? h("span", { class: "st-faint" }, hint) : null), h("div", { class: "st-screen" }, canvas)) };
    };
    const a = this.tracks[this.a].title, b = this.tracks[this.b].title;
    const wanted = this.view === "side" ? this.tracks.map((track) => screen(track.title)) :
      this.view === "wipe" ? [screen(`${a} | ${b}`, "drag the line")] : [screen(`${a} − ${b}`, this.frames > 1 ? "files are compressed, so some of this is the codec" : null)];
    this.canvases = wanted.map((one) => one.canvas);
    this.screens.replaceChildren(...wanted.map((one) => one.element));
    this.screens.dataset.count = wanted.length;
    if (this.view === "wipe") this.handle(wanted[0].canvas.parentElement);
    this.draw();
  }

  handle(box) {
    const line = studio.h("div", { class: "st-wipe", role: "slider", tabindex: "0", "aria-label": "Wipe", "aria-valuemin": "0", "aria-valuemax": "100" });
    const move = (share) => {
      this.wipe = Math.min(1, Math.max(0, share));
      line.style.left = `${100 * this.wipe}%`;
      line.setAttribute("aria-valuenow", String(Math.round(100 * this.wipe)));
      this.draw();
    };
    const drag = (event) => { const at = box.getBoundingClientRect(); move((event.clientX - at.left) / at.width); };
    box.addEventListener("pointerdown", (event) => { box.setPointerCapture(event.pointerId); drag(event); });
    box.addEventListener("pointermove", (event) => event.buttons && drag(event));
    line.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
      if (by) { move(this.wipe + by); event.preventDefault(); event.stopPropagation(); }
    });
    box.append(line);
    move(this.wipe);
  }

  // Decodes every frame once: only so are several videos at the same frame for certain.
  async read() {
    const bytes = this.tracks.length * this.frames * this.width * this.height * 4;
    const scale = Math.min(1, Math.sqrt(MEMORY / bytes));
    const size = { resizeWidth: Math.round(this.width * scale), resizeHeight: Math.round(this.height * scale), resizeQuality: "medium" };
    this.dataset.ready = "no";
    const all = Array.from({ length: this.frames }, (_, i) => i);
    const keep = (bitmaps) => (i, picture) => {
      bitmaps[i] = picture;
      if (i === 0 || i === this.frame) this.draw();
      return this.isConnected;
    };
    try {
      await Promise.all(this.tracks.map((track, i) => studio.decode(track.url, this.fps, all, keep(this.bitmaps[i]), scale < 1 ? size : undefined)));
    } catch (error) {
      this.screens.replaceChildren(studio.h("p", { class: "st-error", role: "alert" }, error.message));
      this.dataset.ready = "failed";
      return;
    }
    if (!this.isConnected) return;
    this.dataset.ready = "yes";
    this.draw();
    this.play(this.frames > 1 && !matchMedia("(prefers-reduced-motion: reduce)").matches);
  }

  play(on) {
    this.playing = on;
    this.playButton.textContent = on ? "❚❚" : "▶";
    if (!on || this.clock) return;
    let before = performance.now();
    const tick = (now) => {
      this.clock = null;
      if (!this.playing || !this.isConnected) return;
      if (now - before >= 1000 / this.fps) {
        before = Math.max(before + 1000 / this.fps, now - 1000 / this.fps);
        this.show((this.frame + 1) % this.frames);
      }
      this.clock = requestAnimationFrame(tick);
    };
    this.clock = requestAnimationFrame(tick);
  }

  step(by) {
    this.play(false);
    this.show((this.frame + by + this.frames) % this.frames);
  }

  show(frame) {
    this.frame = frame;
    this.slider.value = frame;
    this.draw();
  }

  key(key) {
    const actions = { " ": () => this.play(!this.playing), ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1), 1: () => this.setView("side"), 2: () => this.setView("wipe"), 3: () => this.setView("difference") };
    if (!actions[key] || ("123".includes(key) ? this.tracks.length : this.frames) < 2) return false;
    actions[key]();
    return true;
  }

  draw() {
    this.counter.textContent = `${this.frame + 1} / ${this.frames}`;
    const images = this.bitmaps.map((list) => list[Math.min(this.frame, list.length - 1)]);
    if (this.view === "side") images.forEach((image, i) => image && this.paint(this.canvases[i], (context, w, h) => context.drawImage(image, 0, 0, w, h)));
    const a = images[this.a], b = images[this.b];
    if (this.view === "side" || !a || !b) return;
    this.paint(this.canvases[0], this.view === "wipe" ? this.wiped(a, b) : this.difference(a, b));
  }

  wiped(a, b) {
    return (context, w, h) => {
      context.drawImage(b, 0, 0, w, h);
      context.save();
      context.beginPath();
      context.rect(0, 0, w * this.wipe, h);
      context.clip();
      context.drawImage(a, 0, 0, w, h);
      context.restore();
    };
  }

  difference(a, b) {
    return (context, w, h) => {
      context.filter = "none";
      context.drawImage(a, 0, 0, w, h);
      context.globalCompositeOperation = "difference";
      context.drawImage(b, 0, 0, w, h);
      context.globalCompositeOperation = "copy";
      context.filter = `brightness(${this.gain})`;
      context.drawImage(context.canvas, 0, 0);
      context.filter = "none";
      context.globalCompositeOperation = "source-over";
    };
  }

  paint(canvas, draw) {
    if (canvas) draw(canvas.getContext("2d"), canvas.width, canvas.height);
  }
}

customElements.define("studio-player", StudioPlayer);
