/** A rack of adapters: those of a base to choose from, and the chosen ones with a scale each. */

import { element, followRange } from "./dom.js";

const MANY = 8;

/** The adapters of a base, by name: what /v1/models lists of each. */
export function adaptersOf(models, base) {
  const found = new Map();
  for (const { gtl } of models) {
    if (gtl.kind !== "adapter" || gtl.base !== base) continue;
    const known = found.get(gtl.adapter) ?? { name: gtl.adapter, aliases: new Set(), versions: new Set(), shares: true };
    gtl.aliases?.forEach((alias) => known.aliases.add(alias));
    if (gtl.version) known.versions.add(gtl.version);
    known.shares &&= gtl.shares_batch !== false;
    found.set(gtl.adapter, known);
  }
  return found;
}

export class Rack {
  #choice = new Map();
  #chosen = []; // [{ name, reference, scale }]

  /** `fieldset`: an empty one; `onCard(name, version)` is called for a look at a card, `onChange()` after any change. */
  constructor(fieldset, { title, onCard, onChange }) {
    this.fieldset = fieldset;
    this.onCard = onCard;
    this.onChange = onChange;
    this.legend = element("legend", {}, title);
    this.rows = element("ul", { className: "chosen" });
    this.filter = element("input", { type: "search", placeholder: "Find an adapter", "aria-label": "Find an adapter" });
    this.filter.addEventListener("input", () => this.#showPills());
    this.pills = element("div", { className: "pills" });
    fieldset.append(this.legend, this.rows, this.filter, this.pills);
  }

  /** Offer the adapters of a base (see `adaptersOf`); chosen ones stay if they are among them. */
  offer(choice) {
    this.#choice = choice;
    this.filter.value = "";
    this.choose(this.#chosen);
  }

  /** The chosen adapters: name, reference and scale of each. */
  get chosen() {
    return this.#chosen.map((one) => ({ ...one }));
  }

  /** Choose these and no others. Returns the references that are not on offer. */
  choose(adapters) {
    const offered = ({ name, reference }) => this.#choice.has(name) && references(this.#choice.get(name)).has(reference);
    this.#chosen = adapters.filter(offered).map((one) => ({ ...one }));
    this.rows.replaceChildren(...this.#chosen.map((one) => this.#row(one)));
    this.#showPills();
    return adapters.filter((one) => !offered(one)).map(({ reference }) => reference);
  }

  #add(name) {
    const added = { name, reference: name, scale: 1 };
    this.#chosen.push(added);
    const row = this.#row(added);
    this.rows.append(row);
    this.#showPills();
    row.querySelector("input[type=range]").focus();
    this.onChange();
  }

  #remove(adapter) {
    this.choose(this.#chosen.filter((one) => one !== adapter));
    this.pills.querySelector(`[data-name="${CSS.escape(adapter.name)}"]`)?.focus();
    this.onChange();
  }

  #showPills() {
    const free = [...this.#choice.keys()].filter((name) => !this.#chosen.some((one) => one.name === name));
    const wanted = this.filter.value.trim().toLowerCase();
    this.filter.hidden = this.#choice.size <= MANY;
    const shown = free.filter((name) => name.toLowerCase().includes(wanted));
    const none = this.#choice.size ? (free.length ? "None of that name." : "") : "This base has no adapters yet.";
    this.pills.replaceChildren(
      ...(shown.length ? shown.map((name) => this.#pill(name)) : [element("p", { className: "soft" }, none)]),
    );
  }

  #pill(name) {
    const pill = element("button", { type: "button", className: "pill", "aria-label": `Add ${name}` }, name);
    pill.dataset.name = name;
    pill.addEventListener("click", () => this.#add(name));
    return pill;
  }

  #row(adapter) {
    const offer = this.#choice.get(adapter.name);
    const scale = element("input", { type: "range", min: 0, max: 1.5, step: 0.05, "aria-label": `Scale of ${adapter.name}` });
    scale.value = adapter.scale;
    scale.addEventListener("input", () => { adapter.scale = Number(scale.value); this.onChange(); });
    const card = element("button", { type: "button", className: "quiet", "aria-label": `Card of ${adapter.name}` }, "Card");
    card.addEventListener("click", () => this.onCard(adapter.name, adapter.reference.split("@")[1]));
    const remove = element("button", { type: "button", className: "quiet", "aria-label": `Remove ${adapter.name}` }, "×");
    remove.addEventListener("click", () => this.#remove(adapter));
    const head = element("div", { className: "row" }, element("b", {}, adapter.name), this.#versions(adapter, offer), card, remove);
    const range = element("div", { className: "range" }, scale, element("output"));
    followRange(scale, (value) => value.toFixed(2));
    const note = element("p", { className: "soft" }, "Runs in a batch of its own.");
    return element("li", {}, head, range, ...(offer.shares ? [] : [note]));
  }

  #versions(adapter, offer) {
    const select = element("select", { "aria-label": `Version of ${adapter.name}` });
    for (const [reference, text] of references(offer)) select.append(element("option", { value: reference }, text));
    select.value = adapter.reference;
    select.addEventListener("change", () => { adapter.reference = select.value; this.onChange(); });
    return select;
  }
}

/** What a version of an adapter can be asked for by -> how a person reads it. */
function references({ name, aliases, versions }) {
  return new Map([
    [name, "newest"],
    ...[...aliases].map((alias) => [`${name}@${alias}`, `@${alias}`]),
    ...[...versions].reverse().map((version) => [`${name}@${version}`, version]),
  ]);
}
