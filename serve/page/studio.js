/** The studio: what happens between the form, the endpoint, the stage and the gallery. */

import { ApiError, listModels, pictureEvents, pictureOf, saveKey, savedKey } from "./api.js";
import { showCard } from "./card.js";
import { element, fillFacts, find, sayIn } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { changesOf, drawSeed, factsOf, formOf, mixText, requestOf, shareDone } from "./settings.js";
import { Source } from "./source.js";
import { Stage, Tile } from "./stage.js";

const TOAST_MS = 7000;
const LINK_MS = 60_000; // that a browser may take to begin a download

const form = new Form(find("#form"), { onCard: (...wanted) => attempt(() => showCard(...wanted)), onChange: showChanges });
const source = new Source(find("#source"), { onTrouble: showError });
const stage = new Stage(find("#stage"));
const gallery = new Gallery(find("#gallery"), { onOpen: open, onTrouble: showError });

let running = null; // AbortController of the run
let shown = null; // record whose caption and actions are seen
let origin = null; // record that the form's settings are from

// --- errors and keys

function showError(text) {
  sayIn(find("#error"), text);
}

/** Do something with the endpoint; what it refuses is shown in one line, and a missing key is asked for. */
async function attempt(work) {
  showError("");
  form.blame(null);
  try {
    await work();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error.status === 401) askForKey(savedKey() ? error.message : "");
    else showError(error.message);
    if (!(error instanceof ApiError)) throw error;
    form.blame(error.param);
  }
}

function askForKey(complaint) {
  find("#change-key").hidden = false;
  sayIn(find("#key-error"), complaint);
  find("#key-value").value = "";
  if (!find("#key").open) find("#key").showModal();
}

function useKey() {
  if (find("#key").returnValue !== "use") return;
  saveKey(find("#key-value").value.trim());
  find("#key").returnValue = "";
  attempt(load);
}

async function load() {
  form.load(await listModels());
  find("#generate").disabled = false;
}

// --- a run

/** What the pictures of a run are made with, and how their tiles are labelled. */
function planRun() {
  form.check();
  const settings = form.read();
  const seed = settings.seed ?? drawSeed();
  if (form.mode !== "compare") {
    const count = settings.mode === "edit" && settings.invert ? 1 : form.count; // no noise is drawn: all would be the same
  return Array.from({ length: count }, (_, index) => ({ settings: { ...settings, seed: seed + index }, label: "" }));
  }
  return [settings.adapters, form.readOther()].map((adapters, side) => ({
    settings: { ...settings, seed, adapters },
    label: `${"AB"[side]} · ${mixText(adapters)}`,
  }));
}

async function run(plan) {
  if (running) return;
  running = new AbortController();
  const { signal } = running;
  const tiles = plan.map(({ settings, label }) => new Tile({ size: settings.size, label, alt: settings.prompt }));
  showRunning(tiles, plan);
  const files = plan[0].settings.mode === "edit" ? { source: source.image, mask: await source.readMask() } : {};
  const started = performance.now();
  const clock = setInterval(() => { find("#elapsed").textContent = secondsText(started); }, 100);
  const made = await Promise.allSettled(plan.map(({ settings }, index) => make(tiles[index], settings, files, signal)));
  clearInterval(clock);
  running = null;
  showFinished(made, secondsText(started), signal.aborted);
  await attempt(() => {
    const failed = made.find(({ reason }) => reason && reason.name !== "AbortError");
    if (failed) throw failed.reason;
  });
}

/** Make one picture, showing it on its tile as it comes, and put it into the gallery. */
async function make(tile, settings, files, signal) {
  const isEdit = settings.mode === "edit";
  const body = isEdit ? formOf(settings, files.source, files.mask) : requestOf(settings);
  const started = performance.now();
  tile.start();
  try {
    for await (const event of pictureEvents(isEdit ? "v1/images/edits" : "v1/images/generations", body, signal)) {
      const isDone = event.type.endsWith(".completed");
      const picture = pictureOf(event);
      await tile.show(picture, isDone ? 1 : shareDone(event));
      showProgress();
      if (isDone) return await keep(tile, { settings, picture, seconds: (performance.now() - started) / 1000, ...files });
    }
  } catch (error) {
    tile.stop(signal.aborted ? "Cancelled" : "Not finished");
    throw error;
  } finally {
    tile.finish();
  }
}

async function keep(tile, made) {
  const size = `${tile.image.naturalWidth}x${tile.image.naturalHeight}`;
  const record = { id: Date.now() + Math.random(), ...made, size };
  tile.button.addEventListener("click", () => { stage.mark(tile); caption(record); });
  await gallery.add(record);
  return { tile, record };
}

const secondsText = (started) => `${((performance.now() - started) / 1000).toFixed(1)} s`;

function showRunning(tiles, plan) {
  stage.open(tiles, plan.some(({ label }) => label));
  caption(null);
  showButtons(true);
  find(".progress").hidden = false;
  sayState(plan.length > 1 ? `Making ${plan.length} pictures…` : "Waiting for the first preview…");
  find("#progress").value = 0;
  showStage();
}

/** Generate or Cancel; who had the one under the keyboard gets the other. */
function showButtons(isRunning) {
  const [generate, cancel] = [find("#generate"), find("#cancel")];
  const had = document.activeElement;
  generate.disabled = isRunning;
  cancel.hidden = !isRunning;
  if (isRunning && had === generate) cancel.focus();
  if (!isRunning && had === cancel) generate.focus();
}

/** Say how far the run is, to eyes and to ears. */
function sayState(text) {
  find("#status").textContent = text;
  find("#said").textContent = text;
}

/** Bring the stage into view, unless it is. */
function showStage() {
  const { top } = find("#stage").getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) find("#stage").scrollIntoView();
}

function showProgress() {
  find("#progress").value = stage.share;
  if (stage.share < 1) sayState(`${Math.round(stage.share * 100)} % denoised`);
}

function showFinished(made, seconds, isCancelled) {
  const done = made.filter(({ value }) => value).map(({ value }) => value);
  showButtons(false);
  find(".progress").hidden = done.length === made.length;
  if (done.length === made.length) sayState(`Done in ${seconds}`);
  else sayState(isCancelled ? "Cancelled" : "Not finished");
  if (!done.length) return;
  stage.mark(done[0].tile);
  caption(done[0].record);
}

// --- pictures that were made

/** Whether a run is on, which wants the stage and the form for itself. */
function isBusy() {
  if (running) showError("Wait for the pictures that are being made, or cancel them.");
  return Boolean(running);
}

/** Show a picture of the gallery on the stage. */
async function open(record) {
  if (isBusy()) return;
  const tile = new Tile({ size: record.size, label: "", alt: record.settings.prompt });
  stage.open([tile]);
  find(".progress").hidden = true;
  caption(record);
  await tile.show(record.picture, 1);
  showStage();
}

function caption(record) {
  shown = record;
  gallery.mark(record);
  find("#caption").hidden = !record;
  if (!record) return;
  find("#caption-prompt").textContent = record.settings.prompt;
  fillFacts(find("#caption-facts"), factsOf(record));
}

async function restore(record) {
  const missing = form.restore(record.settings);
  if (record.settings.mode === "edit") await source.put(record.source, record.mask);
  showError(missing.length ? `Not served any more: ${missing.join(", ")}` : "");
  return !missing.length;
}

const ACTIONS = {
  async again(record) {
    if (await restore(record)) await run([{ settings: record.settings, label: "" }]);
  },
  async change(record) {
    await restore(record);
    origin = record;
    showChanges();
    find("#origin").focus(); // not a text field: a phone's keyboard would hide what can be changed
  },
  async edit(record) {
    form.mode = "edit";
    await source.put(record.picture);
    origin = null;
    showChanges();
    find("#mask").focus();
  },
  async download({ picture, settings }) {
    const name = settings.prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 40).replace(/^-|-$/g, "") || "picture";
    const link = element("a", { href: URL.createObjectURL(picture), download: `${name}-${settings.seed}.png` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), LINK_MS);
  },
  async delete(record) {
    await gallery.remove(record);
    stage.open([]);
    caption(null);
    toast("Deleted.", () => gallery.add(record).then(() => open(record)));
  },
};

/** Say what the form changes of the picture that its settings are from. */
function showChanges() {
  find("#origin").hidden = !origin;
  if (!origin) return;
  const changes = changesOf(origin.settings, form.read());
  find("#origin p").textContent = changes.length ? `Changed: ${changes.join(", ")}` : "As in this picture. Change one thing.";
  const image = find("#origin img");
  if (image.dataset.of === String(origin.id)) return;
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(origin.thumbnail);
  image.dataset.of = origin.id;
}

let toastTimer = 0;

function toast(text, undo = null) {
  const line = find("#toast");
  const button = find("button", line);
  clearTimeout(toastTimer);
  find("span", line).textContent = text;
  button.hidden = !undo;
  button.onclick = () => { line.hidden = true; undo(); };
  line.hidden = false;
  toastTimer = setTimeout(() => { line.hidden = true; }, TOAST_MS);
}

// --- wiring

find("#form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (form.mode === "edit" && !source.image) showError("image: none yet; choose the image to edit");
  else attempt(() => run(planRun()));
});
find("#cancel").addEventListener("click", () => running?.abort());
find("#caption").addEventListener("click", ({ target }) => {
  const { action } = target.dataset;
  if (action && (action === "download" || !isBusy())) attempt(() => ACTIONS[action](shown));
});
find("#gallery-clear").addEventListener("click", async () => {
  if (isBusy() || !confirm("Delete all pictures of the contact sheet?")) return;
  await gallery.clear();
  stage.open([]);
  caption(null);
});
find("#origin button").addEventListener("click", () => { origin = null; showChanges(); });
find("#change-key").addEventListener("click", () => askForKey(""));
find("#key").addEventListener("close", useKey);

find("#change-key").hidden = !savedKey();
await gallery.load();
await attempt(load);
