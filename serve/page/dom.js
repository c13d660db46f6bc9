/** Elements. Strings become text, never HTML, whatever a server or a person wrote in them. */

export const find = (selector, within = document) => within.querySelector(selector);

/** A new element; names that it has no property for become attributes. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Fill a <dl> with pairs of term and description. */
export function fillFacts(list, facts) {
  list.replaceChildren(...facts.map(([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, value))));
}

/** Show one line, or hide it. */
export function sayIn(line, text) {
  line.textContent = text;
  line.hidden = !text;
}

/** Have a range's <output> follow it. */
export function followRange(input, format) {
  const output = find("output", input.parentElement);
  const show = () => { output.textContent = format(Number(input.value)); };
  input.addEventListener("input", show);
  show();
}

/** A canvas with a picture's file upright, its longest side at most so many pixels. */
export async function shrunk(file, longest) {
  const bitmap = await createImageBitmap(file);
  const shrink = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
  const canvas = element("canvas", { width: Math.round(bitmap.width * shrink), height: Math.round(bitmap.height * shrink) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas;
}

/** What is on a canvas as a file. */
export const blobOf = (canvas, type = "image/png", quality = undefined) =>
  new Promise((resolve) => { canvas.toBlob(resolve, type, quality); });
