// What all elements of the studio share: requests, building of elements, theme, tabs, shortcuts.
"use strict";

const TITLES = { generate: "Generate", compare: "Compare", inspect: "Look inside", bench: "Bench" };

const studio = (() => {
  const bus = new EventTarget();

  // JSON of an address below /studio. Throws Error with words for the user.
  async function get(path, method = "GET") {
    let answer;
    try {
      answer = await fetch(`/studio/${path}`, { method });
    } catch {
      throw new Error("The studio does not answer. Is it still running?");
    }
    const content = await answer.json().catch(() => ({}));
    if (!answer.ok) throw Object.assign(new Error(content.error || `The studio says ${answer.status}.`), { status: answer.status });
    return content;
  }

  // An element: h("p", {class: "x", onclick: f}, "text", child, ...).
  function h(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name in element && typeof value !== "string") element[name] = value;
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return element;
  }

  let forms;
  const known = () => (forms ??= get("forms").catch((error) => { forms = undefined; throw error; }));

  // A text input of Gradio's, as if it was typed.
  function type(id, text) {
    const field = document.querySelector(`#${id} textarea, #${id} input`);
    if (!field) return;
    const home = field.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
    Object.getOwnPropertyDescriptor(home.prototype, "value").set.call(field, text);
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }

  const tab = () => document.querySelector('#tabs [role="tab"][aria-selected="true"]')?.textContent.trim() ?? "";
  const openTab = (title) => [...document.querySelectorAll('#tabs [role="tab"]')].find((one) => one.textContent.trim() === title)?.click();
  // Shows a finished run in its tab, whose elements are not there before it is opened once.
  const wanted = {};
  function open(card) {
    wanted[card.kind] = card;
    openTab(TITLES[card.kind]);
    bus.dispatchEvent(new CustomEvent("open", { detail: card }));
  }
  const stage = (kind) => document.querySelector(`studio-stage[kind="${kind}"]`);
  const visible = (selector) => [...document.querySelectorAll(selector)].find((one) => one.offsetParent !== null);

  let note;
  function say(text) {
    note?.remove();
    note = h("div", { class: "st-note", role: "status" }, text);
    document.body.append(note);
    setTimeout(() => note?.remove(), 2600);
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      say("Copied");
    } catch {
      say("This browser copies over https or on localhost only: select the text.");
    }
  }

  function theme(dark) {
    document.body.classList.toggle("dark", dark);
  }

  // What the user chose stays; who never chose gets what the browser prefers.
  function turn() {
    const dark = !document.body.classList.contains("dark");
    theme(dark);
    try { localStorage.setItem("studio-theme", dark ? "dark" : "light"); } catch { /* private window */ }
  }

  const number = (value, digits = 2, unit = "") =>
    value === null || value === undefined || Number.isNaN(value) ? "–" : value.toFixed(digits) + unit;
  const seconds = (value) =>
    value === null || value === undefined ? "–" : value >= 90 ? `${Math.floor(value / 60)} min ${Math.round(value % 60)} s` : value >= 10 ? `${Math.round(value)} s` : `${value.toFixed(1)} s`;
  // What a run was of, in short.
  const facts = (card) => [`seed ${card.settings.seed}`, `${card.frames === 1 ? "an image" : `${card.frames} frames`} of ${card.height}x${card.width}`, `${card.settings.num_inference_steps} steps`, card.model, card.machine.gpu ?? card.machine.processor].join(" · ");
  const file = (run, name) => `/studio/files/${run}/${name}`;

  // A video that shows the frames of a file one by one: seek(i) is done when frame i can be drawn.
  // Browsers may say "seeked" a moment before the picture is there, so the picture's own time counts.
  async function frames(url, fps) {
    const video = h("video", { muted: true, playsInline: true, preload: "auto", src: url });
    const event = (name) => new Promise((done, fail) => {
      video.addEventListener(name, done, { once: true });
      video.addEventListener("error", () => fail(new Error(`This browser cannot play the video (H.264): ${video.error?.message || "it does not say why"}.`)), { once: true });
    });
    let shown = -1;
    const watch = () => video.requestVideoFrameCallback?.((_, about) => { shown = Math.round(about.mediaTime * fps); watch(); });
    watch();
    if (video.readyState < 2) await event("loadeddata");
    const seek = async (i) => {
      const there = event("seeked");
      video.currentTime = (i + 0.5) / fps;
      await there;
      for (let waited = 0; shown !== i && waited < 15; waited++) await new Promise((done) => setTimeout(done, 10));
      return video;
    };
    return { seek, close: () => { video.removeAttribute("src"); video.load(); } };
  }

  // The one frame of a PNG.
  async function still(url, keep, size) {
    const image = new Image();
    image.src = url;
    await image.decode().catch(() => { throw new Error("This browser cannot read the image."); });
    keep(0, await (size ? createImageBitmap(image, size) : createImageBitmap(image)));
  }

  // Hands keep(i, picture) each wanted frame of a file, until keep says false. Tries twice, since a
  // busy browser now and then gives up on a video.
  async function decode(url, fps, wanted, keep, size, tries = 2) {
    if (url.endsWith(".png")) return still(url, keep, size);
    try {
      const video = await frames(url, fps);
      for (const i of wanted) {
        const seen = await video.seek(i);
        if (keep(i, await (size ? createImageBitmap(seen, size) : createImageBitmap(seen))) === false) break;
      }
      video.close();
    } catch (error) {
      if (tries < 2) throw error;
      await decode(url, fps, wanted, keep, size, tries - 1);
    }
  }

  return {
    decode, bus, get, h, known, type, tab, open, wanted, visible, say, copy, theme, turn, facts, number, seconds, file,
    post: (path) => get(path, "POST"),
    on: (name, action) => bus.addEventListener(name, (event) => action(event.detail)),
    tell: (name, detail) => bus.dispatchEvent(new CustomEvent(name, { detail })),
    chosen: "bundled",
    // Called by Gradio's events in page.py.
    model: (name) => { studio.chosen = name; studio.tell("model", name); },
    runs: (kind) => {
      // Gradio says nothing of a server that is gone.
      get("jobs").catch((error) => stage(kind)?.failed(error.message));
      return JSON.stringify(document.querySelector(`:is(studio-methods, studio-bench-form)[kind="${kind}"]`)?.form() ?? {});
    },
    answer: (kind, text) => stage(kind)?.answer(text ? JSON.parse(text) : { error: "The studio could not take this. Its log says why." }),
  };
})();

class StudioHeader extends HTMLElement {
  connectedCallback() {
    const { h } = studio;
    let stored = null;
    try { stored = localStorage.getItem("studio-theme"); } catch { /* private window */ }
    studio.theme(stored ? stored === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
    this.replaceChildren(
      h("img", { src: "/studio/static/icon.svg", alt: "", width: "30", height: "30" }),
      h("div", { class: "st-brand" }, h("h1", {}, "vdit-sparse studio"), h("p", {}, "See what sparse attention does to a video or an image, and what it saves.")),
      h("button", { class: "st-icon", title: "Keyboard shortcuts (?)", "aria-label": "Keyboard shortcuts", onclick: shortcuts }, "?"),
      h("button", { class: "st-icon", title: "Light or dark", "aria-label": "Light or dark", onclick: studio.turn }, "◐"),
    );
  }
}

class StudioExamples extends HTMLElement {
  async connectedCallback() {
    const { examples } = await studio.known().catch(() => ({ examples: [] }));
    this.replaceChildren(...examples.map((text) => studio.h("button", { class: "st-chip", title: text, onclick: () => studio.type("prompt", text) }, text)));
  }
}

// Bench has nothing to do with what stands on the left: studio.css hides it.
for (const name of ["click", "keyup"]) document.addEventListener(name, () => setTimeout(() => { document.body.dataset.tab = studio.tab(); }, 60));

const KEYS = [
  ["Ctrl + Enter", "start what the open tab does"],
  ["Esc", "cancel the run that is going on"],
  ["Space", "play or pause"],
  ["← →", "one frame back or on"],
  ["1 2 3", "side by side, wipe, difference"],
  ["D", "light or dark"],
  ["?", "this list"],
];

function shortcuts() {
  const { h } = studio;
  const list = h("dl", {}, KEYS.map(([key, text]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, text)]));
  const box = h("dialog", { class: "st-dialog" }, h("h2", {}, "Keyboard"), list, h("button", { class: "st-button", onclick: () => box.close() }, "Close"));
  box.addEventListener("close", () => box.remove());
  box.addEventListener("click", (event) => event.target === box && box.close());
  document.body.append(box);
  box.showModal();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey && event.key === "Enter") {
    event.preventDefault();
    studio.visible("button.start, .start button")?.click();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  // Escape in an open list closes the list.
  const list = event.target.closest?.("select, [role=combobox]");
  if (event.key === "Escape" && !list && !document.querySelector("dialog[open]")) studio.visible("studio-stage")?.cancel();
  const from = event.target;
  if (from.closest?.("input, textarea, select, [role=slider], [contenteditable]")) return;
  if (event.key === " " && from.closest?.("button, summary, a")) return;
  if (event.key === "?") shortcuts();
  else if (event.key === "d") studio.turn();
  else if (studio.visible("studio-player")?.key(event.key)) event.preventDefault();
});

customElements.define("studio-header", StudioHeader);
customElements.define("studio-examples", StudioExamples);
