/** The stage: a tile for each picture of a run, from noise to the finished picture, and a wipe between two. */

import { element, find } from "./dom.js";
import { parseSize } from "./settings.js";

const SMALL = 256; // pixels below which a picture is enlarged as squares: more honest than a blur

/** Fill a canvas with noise: what every picture starts from. */
export function drawNoise(canvas) {
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  const values = crypto.getRandomValues(new Uint8Array(pixels.data.length));
  for (let at = 0; at < values.length; at += 4) {
    const grey = 70 + values[at] * 0.5;
    pixels.data.set([grey + values[at + 1] * 0.2, grey + values[at + 2] * 0.1, grey + values[at + 3] * 0.16, 255], at);
  }
  context.putImageData(pixels, 0, 0);
}

/** One picture in the making. */
export class Tile {
  #noise = element("canvas", { width: 48, height: 48, "aria-hidden": "true" });
  #timer = 0;
  #url = "";

  constructor({ size, label, alt }) {
    this.share = 0;
    this.label = element("span", { className: "label" }, label);
    this.image = element("img", { alt, hidden: true });
    this.line = element("p", { className: "line", hidden: true });
    this.button = element("button", { type: "button", className: "tile", disabled: true }, this.#noise, this.image, this.line);
    if (label) this.button.append(this.label);
    this.fit(parseSize(size) ?? { width: 1, height: 1 });
  }

  /** Take the shape of the picture. */
  fit({ width, height }) {
    this.button.style.setProperty("--ratio", String(width / height));
    this.image.classList.toggle("small", width > 1 && Math.max(width, height) < SMALL);
  }

  start() {
    this.button.classList.add("running");
    drawNoise(this.#noise);
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) this.#timer = setInterval(() => drawNoise(this.#noise), 90);
  }

  /** Show a picture, partial or finished. */
  async show(blob, share) {
    const url = URL.createObjectURL(blob);
    this.image.src = url;
    await this.image.decode();
    URL.revokeObjectURL(this.#url);
    this.#url = url;
    this.share = share;
    this.fit({ width: this.image.naturalWidth, height: this.image.naturalHeight });
    this.image.hidden = false;
    if (share === 1) this.button.disabled = false;
    this.#still();
  }

  /** End without a picture, or with a partial one. */
  stop(text) {
    this.line.textContent = text;
    this.line.hidden = false;
    this.#still();
    this.button.classList.remove("running");
  }

  finish() {
    this.button.classList.remove("running");
  }

  free() {
    this.#still();
    URL.revokeObjectURL(this.#url);
  }

  #still() {
    clearInterval(this.#timer);
  }
}

export class Stage {
  #tiles = [];
  #wipe = null;

  constructor(section) {
    this.room = find("#tiles", section);
    this.blank = find("#blank", section);
    this.views = find("#wiping", section);
    drawNoise(find("canvas", this.blank));
    this.views.addEventListener("click", ({ target }) => {
      if (target.dataset.view) this.#view(target.dataset.view);
    });
  }

  /** Set up tiles; two that are a pair can be wiped between. */
  open(tiles, isPair = false) {
    this.#tiles.forEach((tile) => tile.free());
    this.#tiles = tiles;
    this.room.replaceChildren(...tiles.map((tile) => tile.button));
    this.room.dataset.count = String(tiles.length);
    this.blank.hidden = tiles.length > 0;
    this.views.hidden = !isPair;
    this.#wipe = isPair ? this.#makeWipe() : null;
    if (isPair) this.room.append(this.#wipe);
    this.#view("beside");
  }

  get share() {
    return this.#tiles.reduce((sum, tile) => sum + tile.share, 0) / this.#tiles.length;
  }

  mark(chosen) {
    for (const tile of this.#tiles) tile.button.classList.toggle("marked", tile === chosen && this.#tiles.length > 1);
  }

  #view(name) {
    this.room.classList.toggle("wiped", name === "wipe");
    for (const button of this.views.children) button.setAttribute("aria-pressed", String(button.dataset.view === name));
  }

  #makeWipe() {
    const range = element("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Wipe between A and B" });
    const move = () => this.room.style.setProperty("--wipe", `${range.value}%`);
    range.addEventListener("input", move);
    move();
    return element("div", { className: "wipe" }, range, element("i", { "aria-hidden": "true" }));
  }
}
