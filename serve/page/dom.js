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
