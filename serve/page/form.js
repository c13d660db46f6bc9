/** The form: settings in, settings out. */

import { ApiError } from "./api.js";
import { element, find, followRange } from "./dom.js";
import { Rack, adaptersOf } from "./rack.js";
import { drawSeed, parseSize, pixelsOf } from "./settings.js";

const DRAFT = "gtl-draft";
const SHAPES = [["square", 1, 1], ["tall", 3, 4], ["wide", 4, 3]];

export class Form {
  #models = [];

  /** `onCard(name, version)` is called for a look at a card, `onChange()` after any change. */
  constructor(form, { onCard, onChange }) {
    this.form = form;
    this.base = find("#model");
    this.prompt = find("#prompt");
    const change = () => { this.#save(); onChange(); };
    this.racks = ["a", "b"].map((side) => {
      const title = side === "a" ? "Adapters" : "B";
      return new Rack(find(`#rack-${side}`), { title, onCard, onChange: change });
    });
    followRange(find("#strength"), (value) => value.toFixed(2));
    find("#dice").addEventListener("click", () => { find("#seed").value = drawSeed(); change(); });
    this.base.addEventListener("change", () => { this.#offer(); change(); });
    form.addEventListener("change", ({ target }) => {
      if (target.name === "mode") this.#showMode();
      if (target.name === "shape") this.#showShape();
    });
    form.addEventListener("input", change);
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    this.#showMode();
  }

  /** Offer what the endpoint serves (see /v1/models). */
  load(models) {
    this.#models = models;
    const bases = models.filter(({ gtl }) => gtl.kind === "base").map(({ id }) => id);
    this.base.replaceChildren(...bases.map((id) => element("option", { value: id }, id)));
    this.base.disabled = bases.length < 2;
    this.#offer();
    this.#resume();
  }

  get mode() {
    return this.form.elements.mode.value;
  }

  set mode(mode) {
    this.form.elements.mode.value = mode;
    this.#showMode();
  }

  get count() {
    return this.mode === "compare" ? 1 : Number(find("#count").value);
  }

  /** The settings of one picture; the seed is null where one is to be drawn. */
  read() {
    const number = (id) => (find(id).value === "" ? null : Number(find(id).value));
    return {
      mode: this.mode === "edit" ? "edit" : "create",
      base: this.base.value,
      prompt: this.prompt.value.trim(),
      negative: find("#negative").value.trim(),
      size: this.#size(),
      steps: number("#steps"),
      guidance: number("#guidance"),
      seed: number("#seed"),
      strength: number("#strength"),
      invert: find("#invert").value.trim(),
      keepsColours: find("#colors").checked,
      adapters: this.racks[0].chosen,
    };
  }

  /** A mistake that the endpoint would find too, before it is asked. */
  check() {
    const size = this.#size();
    const { max_pixels: most = Infinity } = this.#origin ?? {};
    if (pixelsOf(size) <= most) return;
    const text = `size: ${size} has ${pixelsOf(size)} pixels; ${this.base.value} draws at most ${most}`;
    throw new ApiError(text, { param: "size" });
  }

  /** The adapters of side B. */
  readOther() {
    return this.racks[1].chosen;
  }

  /** Put settings into the form. Returns the names of what the endpoint does not serve any more. */
  restore(settings) {
    const isServed = [...this.base.options].some(({ value }) => value === settings.base);
    if (isServed) this.base.value = settings.base;
    this.#offer();
    this.mode = settings.mode;
    this.prompt.value = settings.prompt;
    for (const name of ["negative", "steps", "guidance", "seed", "strength", "invert"]) find(`#${name}`).value = settings[name] ?? "";
    find("#colors").checked = Boolean(settings.keepsColours);
    find("#strength").dispatchEvent(new Event("input")); // its output follows
    this.#chooseSize(settings.size);
    const missing = this.racks[0].choose(settings.adapters);
    return isServed ? missing : [settings.base, ...missing];
  }

  /** Mark the field that an error is about, or none. `parameter`: its name in the API. */
  blame(parameter) {
    [...this.form.elements].forEach((field) => field.removeAttribute("aria-invalid"));
    const blamed = [...this.form.elements].filter(({ name }) => name && name === parameter);
    blamed.forEach((field) => field.setAttribute("aria-invalid", "true"));
  }

  #showMode() {
    const shown = { "#source": this.mode === "edit", "#rack-b": this.mode === "compare" };
    for (const [id, isShown] of Object.entries(shown)) {
      find(id).hidden = !isShown;
      find(id).disabled = !isShown;
    }
    find("#rack-a").classList.toggle("side-a", this.mode === "compare");
    this.racks[0].legend.textContent = this.mode === "compare" ? "A" : "Adapters";
    find("#count-field").hidden = this.mode === "compare";
  }

  #offer() {
    const choice = adaptersOf(this.#models, this.base.value);
    this.racks.forEach((rack) => rack.offer(choice));
    const chosen = this.#models.length ? this.#size() : "auto";
    const { default_size: own, max_pixels: most = Infinity } = this.#origin ?? {};
    const shapes = parseSize(own) ? SHAPES.map(([name, wide, high]) => [name, sizeOf(own, wide, high)]) : [];
    const sizes = shapes.filter(([, size]) => pixelsOf(size) <= most);
    const options = [["auto", "auto"], ...sizes, ["custom", "custom"]];
    find("#shapes").replaceChildren(...options.map(([name, value]) => shapeOption(name, value)));
    this.#chooseSize(parseSize(chosen) && this.#isCustom(chosen) ? chosen : "auto");
  }

  /** What the endpoint says of the base that is chosen. */
  get #origin() {
    return this.#models.find(({ id }) => id === this.base.value)?.gtl;
  }

  #isCustom(size) {
    return size === `${find("#width").value}x${find("#height").value}`;
  }

  #size() {
    const shape = this.form.elements.shape?.value ?? "auto";
    return shape === "custom" ? `${find("#width").value}x${find("#height").value}` : shape;
  }

  #chooseSize(size) {
    const shapes = [...this.form.querySelectorAll("[name=shape]")];
    const fitting = shapes.find(({ value }) => value === size) ?? shapes.at(-1);
    fitting.checked = true;
    const sides = parseSize(size);
    if (sides) {
      find("#width").value = sides.width;
      find("#height").value = sides.height;
    }
    this.#showShape();
  }

  #showShape() {
    const shape = this.form.elements.shape.value;
    const isCustom = shape === "custom";
    const most = isCustom && this.#origin?.max_pixels;
    find("#size-text").textContent = most ? `up to ${most} pixels` : parseSize(shape) ? shape.replace("x", " × ") : "";
    find("#custom-size").hidden = !isCustom;
    for (const field of [find("#width"), find("#height")]) {
      field.disabled = !isCustom;
      field.required = isCustom;
    }
  }

  #save() {
    localStorage.setItem(DRAFT, JSON.stringify(this.read()));
  }

  #resume() {
    const draft = localStorage.getItem(DRAFT);
    if (draft) this.restore(JSON.parse(draft));
  }
}

/** "WxH" of a shape with about as many pixels as a base's own size, in the steps that models learn sizes in. */
function sizeOf(own, wide, high) {
  const { width, height } = parseSize(own);
  const unit = Math.sqrt((width * height) / (wide * high));
  const step = width < 512 ? 16 : 64;
  const rounded = (side) => Math.max(step, Math.round((side * unit) / step) * step);
  return `${rounded(wide)}x${rounded(high)}`;
}

function shapeOption(name, value) {
  const radio = element("input", { type: "radio", name: "shape", value });
  const drawn = element("i", { className: `shape ${name}`, "aria-hidden": "true" });
  return element("label", {}, radio, element("span", {}, drawn, name));
}
