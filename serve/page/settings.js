/** The settings of a picture: plain values, which make up requests and are kept beside the picture. */

const PARTIAL_IMAGES = 3;

/** A seed to be drawn by chance: within what every client and server can hold. */
export const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;

/** Width and height of "WxH"; null for "auto". */
export function parseSize(size) {
  const match = /^(\d+)x(\d+)$/.exec(size ?? "");
  return match && { width: Number(match[1]), height: Number(match[2]) };
}

/** Of a size; none of "auto". */
export function pixelsOf(size) {
  const sides = parseSize(size);
  return sides ? sides.width * sides.height : 0;
}

/** One adapter as a person reads it: "dog@prod 0.80". */
export const adapterText = ({ reference, scale }) => `${reference} ${scale.toFixed(2)}`;

export const mixText = (adapters) => adapters.map(adapterText).join(" + ") || "no adapter";

/** The body of a request: fields that are null are the server's to choose. */
export function requestOf(settings) {
  const fields = {
    model: settings.base,
    prompt: settings.prompt,
    negative_prompt: settings.negative || null,
    size: settings.size,
    seed: settings.seed,
    num_inference_steps: settings.steps,
    guidance_scale: settings.guidance,
    adapters: settings.adapters.length
      ? settings.adapters.map(({ reference, scale }) => ({ name: reference, scale }))
      : null,
    strength: settings.mode === "edit" ? settings.strength : null,
    invert: settings.mode === "edit" ? settings.invert || null : null,
    output_format: "png",
    stream: true,
    partial_images: PARTIAL_IMAGES,
  };
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
}

/** The same as a form with files, for edits. `source`, `mask`: Blob; no mask leaves all of the image free. */
export function formOf(settings, source, mask) {
  const form = new FormData();
  for (const [name, value] of Object.entries(requestOf(settings))) {
    form.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  form.append("image", source, "image.png");
  if (settings.keepsColours) form.append("colors_of", source, "image.png");
  if (mask) form.append("mask", mask, "mask.png");
  return form;
}

/** What a partial image's event says of how far its picture is, from 0 to 1. */
export const shareDone = (event) => (event.partial_image_index + 1) / (PARTIAL_IMAGES + 1);

/** Terms and values of what a picture was made with. */
export function factsOf({ settings, size, seconds }) {
  return [
    ["Base", settings.base],
    ["Adapters", mixText(settings.adapters)],
    ["Size", size.replace("x", "×")],
    ["Seed", String(settings.seed)],
    ["Steps", String(settings.steps ?? "auto")],
    ["Guidance", String(settings.guidance ?? "auto")],
    ...(settings.negative ? [["Keep out", settings.negative]] : []),
    ...(settings.mode === "edit" ? [["Strength", settings.strength.toFixed(2)]] : []),
    ...(settings.mode === "edit" && settings.invert ? [["Image shows", settings.invert]] : []),
    ...(settings.mode === "edit" && settings.keepsColours ? [["Colours", "of the image"]] : []),
    ["Took", `${seconds.toFixed(1)} s`],
  ];
}

const editShown = ({ strength, invert, keepsColours }) => ({
  strength,
  "what it shows": invert || "not said",
  colours: keepsColours ? "of the image" : "free",
});

/** What differs between two settings, a short text for each difference. */
export function changesOf(before, after) {
  const shown = (settings) => ({
    base: settings.base,
    prompt: settings.prompt,
    "negative prompt": settings.negative || "none",
    adapters: mixText(settings.adapters),
    size: settings.size,
    steps: settings.steps ?? "auto",
    guidance: settings.guidance ?? "auto",
    seed: settings.seed ?? "random",
    ...(before.mode === "edit" ? editShown(settings) : {}),
  });
  const [old, now] = [shown(before), shown(after)];
  return Object.keys(old)
    .filter((name) => old[name] !== now[name])
    .map((name) => (name === "prompt" ? "prompt" : `${name} ${old[name]} → ${now[name]}`));
}
