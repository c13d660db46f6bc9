/** The image to edit, and the mask painted over it. */

import { blobOf, element, find, followRange, shrunk } from "./dom.js";

const LONGEST_SIDE = 1536;
const KEY_STEP = 0.02; // of the width, a press of an arrow key

export class Source {
  #image = null; // Blob
  #url = "";
  #isPainted = false;
  #last = null; // where the brush was, in pixels of the mask

  /** `onTrouble(text)` is called for a file that is no image. */
  constructor(fieldset, { onTrouble }) {
    this.onTrouble = onTrouble;
    this.file = find("#image", fieldset);
    this.easel = find("#easel", fieldset);
    this.picture = find("img", this.easel);
    this.mask = find("#mask", fieldset);
    this.cursor = find("#brush-cursor", fieldset);
    this.brush = find("#brush", fieldset);
    this.erase = find("#erase", fieldset);
    this.drop = find("#drop", fieldset);
    this.file.addEventListener("change", () => this.#take(this.file.files[0]));
    find("#clear-mask", fieldset).addEventListener("click", () => this.#clear());
    followRange(this.brush, (value) => `${value} %`);
    this.#listenForDrops(fieldset);
    this.#listenForPaint();
  }

  /** The image, a Blob; null where none was chosen. */
  get image() {
    return this.#image;
  }

  /** A PNG whose transparent pixels are to be repainted; null if nothing was painted. */
  async readMask() {
    if (!this.#isPainted) return null;
    const { width, height } = this.mask;
    const canvas = element("canvas", { width, height });
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.mask, 0, 0);
    return blobOf(canvas);
  }

  /** Edit this image; a mask as `readMask` returns them is painted over it. */
  async put(image, mask = null) {
    URL.revokeObjectURL(this.#url);
    this.#image = image;
    this.#url = URL.createObjectURL(image);
    this.picture.src = this.#url;
    await this.picture.decode();
    this.mask.width = this.picture.naturalWidth;
    this.mask.height = this.picture.naturalHeight;
    this.#isPainted = false;
    this.easel.hidden = false;
    this.drop.hidden = true;
    if (mask) await this.#repaint(mask);
  }

  async #take(file) {
    this.file.value = "";
    if (!file) return;
    try {
      await this.put(await upright(file));
    } catch {
      this.onTrouble(`${file.name}: not an image that this browser can read; expected PNG, JPEG or WebP`);
    }
  }

  async #repaint(mask) {
    const context = this.#context("source-over");
    context.fillRect(0, 0, this.mask.width, this.mask.height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(await createImageBitmap(mask), 0, 0);
    this.#isPainted = true;
  }

  #clear() {
    this.mask.getContext("2d").clearRect(0, 0, this.mask.width, this.mask.height);
    this.#isPainted = false;
  }

  #listenForDrops(fieldset) {
    fieldset.addEventListener("dragover", (event) => { event.preventDefault(); fieldset.classList.add("over"); });
    fieldset.addEventListener("dragleave", () => fieldset.classList.remove("over"));
    fieldset.addEventListener("drop", (event) => {
      event.preventDefault();
      fieldset.classList.remove("over");
      this.#take(event.dataTransfer.files[0]);
    });
  }

  #listenForPaint() {
    this.mask.addEventListener("pointerdown", (event) => {
      this.mask.setPointerCapture(event.pointerId);
      this.#last = null;
      this.#paint(this.#place(event));
    });
    this.mask.addEventListener("pointermove", (event) => {
      const place = this.#place(event);
      this.#showCursor(place);
      if (event.buttons) this.#paint(place);
    });
    this.mask.addEventListener("pointerleave", () => { this.cursor.hidden = true; });
    this.mask.addEventListener("blur", () => { this.cursor.hidden = true; });
    this.mask.addEventListener("keydown", (event) => this.#press(event));
  }

  /** Arrows move the brush, space or Enter puts it down. */
  #press(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0], Enter: [0, 0] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const { width, height } = this.mask;
    const from = this.#last ?? { x: width / 2, y: height / 2 };
    const within = (value, end) => Math.min(Math.max(value, 0), end);
    const place = { x: within(from.x + move[0] * KEY_STEP * width, width), y: within(from.y + move[1] * KEY_STEP * width, height) };
    this.#last = null;
    if (event.key === " " || event.key === "Enter") this.#paint(place);
    this.#last = place;
    this.#showCursor(place);
  }

  #place({ clientX, clientY }) {
    const box = this.mask.getBoundingClientRect();
    const zoom = this.mask.width / box.width;
    return { x: (clientX - box.left) * zoom, y: (clientY - box.top) * zoom };
  }

  get #brushWidth() {
    return (Number(this.brush.value) / 100) * this.mask.width;
  }

  #paint(place) {
    const context = this.#context(this.erase.checked ? "destination-out" : "source-over");
    const from = this.#last ?? place;
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(place.x, place.y);
    context.stroke();
    context.beginPath(); // a stroke of no length draws nothing
    context.arc(place.x, place.y, this.#brushWidth / 2, 0, 2 * Math.PI);
    context.fill();
    this.#last = place;
    this.#isPainted ||= !this.erase.checked;
  }

  #context(operation) {
    const context = this.mask.getContext("2d");
    context.globalCompositeOperation = operation;
    context.strokeStyle = context.fillStyle = "#ff7a1a";
    context.lineWidth = this.#brushWidth;
    context.lineCap = context.lineJoin = "round";
    return context;
  }

  #showCursor({ x, y }) {
    const zoom = this.mask.getBoundingClientRect().width / this.mask.width;
    const style = this.cursor.style;
    style.width = style.height = `${this.#brushWidth * zoom}px`;
    style.left = `${x * zoom}px`;
    style.top = `${y * zoom}px`;
    this.cursor.hidden = false;
  }
}

/** A file as a PNG that stands upright, is not larger than needed and carries nothing beside its pixels. */
const upright = async (file) => blobOf(await shrunk(file, LONGEST_SIDE));
