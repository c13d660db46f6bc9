/** The gallery: small pictures of what was made here, newest first. */

import { blobOf, element, find, shrunk } from "./dom.js";
import { beyondBounds, erasePicture, erasePictures, readPictures, writePicture } from "./store.js";

const THUMBNAIL = 256;

export class Gallery {
  #records = [];
  #items = new Map(); // id -> <li>

  /** `onOpen(record)` is called for a look at a picture, `onTrouble(text)` when the browser does not keep one. */
  constructor(section, { onOpen, onTrouble }) {
    this.section = section;
    this.sheet = find("#sheet", section);
    this.onOpen = onOpen;
    this.onTrouble = onTrouble;
  }

  /** Show what an earlier visit left. */
  async load() {
    try {
      this.#records = await readPictures();
    } catch {
      this.onTrouble("This browser keeps no pictures: they are gone when the page is.");
    }
    this.sheet.replaceChildren(...this.#records.map((record) => this.#item(record)));
    this.#count();
  }

  /** Keep a picture and show it first. */
  async add(record) {
    record.thumbnail ??= await thumbnailOf(record.picture);
    this.#records.push(record);
    this.#records.sort((one, other) => (one.id < other.id ? 1 : -1));
    const later = this.#records[this.#records.indexOf(record) + 1];
    this.sheet.insertBefore(this.#item(record), this.#items.get(later?.id) ?? null);
    await this.#keep(record);
    for (const old of beyondBounds(this.#records)) await this.remove(old);
    this.#count();
  }

  async remove(record) {
    this.#records = this.#records.filter(({ id }) => id !== record.id);
    this.#drop(record.id);
    await erasePicture(record.id).catch(() => {}); // never written, or the browser has no database
    this.#count(); // last, as in add: what the count says is what a reload shows
  }

  async clear() {
    this.#records.forEach(({ id }) => this.#drop(id));
    this.#records = [];
    await erasePictures().catch(() => {});
    this.#count();
  }

  /** Mark the picture that is being looked at. */
  mark(record) {
    for (const [id, item] of this.#items) find("button", item).setAttribute("aria-pressed", String(id === record?.id));
  }

  async #keep(record) {
    try {
      await writePicture(record);
    } catch {
      this.onTrouble("This picture could not be kept: the browser's storage is full or shut.");
    }
  }

  #item(record) {
    const image = element("img", { alt: "", loading: "lazy", src: URL.createObjectURL(record.thumbnail) });
    const label = `Open: ${record.settings.prompt}, seed ${record.settings.seed}`;
    const button = element("button", { type: "button", "aria-label": label, "aria-pressed": "false", title: record.settings.prompt }, image);
    button.addEventListener("click", () => this.onOpen(record));
    const item = element("li", {}, button);
    this.#items.set(record.id, item);
    return item;
  }

  #drop(id) {
    const item = this.#items.get(id);
    if (!item) return;
    URL.revokeObjectURL(find("img", item).src);
    item.remove();
    this.#items.delete(id);
  }

  #count() {
    this.section.hidden = !this.#records.length;
    find("#gallery-count").textContent = this.#records.length === 1 ? "1 picture" : `${this.#records.length} pictures`;
  }
}

const thumbnailOf = async (picture) => blobOf(await shrunk(picture, THUMBNAIL), "image/webp", 0.85);
