"""What tests ask the studio page in its browser, as JavaScript."""

WAIT_MS = 30_000
"""Until something is there: the machine may be busy."""

KEPT = """async () => {
  const database = await new Promise(resolve => {
    const opening = indexedDB.open("gtl-studio", 1);
    opening.onsuccess = () => resolve(opening.result);
  });
  const records = await new Promise(resolve => {
    const asked = database.transaction("pictures").objectStore("pictures").getAll();
    asked.onsuccess = () => resolve(asked.result);
  });
  database.close();
  const text = blob => blob && new Promise(resolve => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",")[1]);
    reader.readAsDataURL(blob);
  });
  return Promise.all(records.map(async record => ({
    ...record, picture: await text(record.picture), source: await text(record.source), mask: await text(record.mask),
  })));
}"""
"""Records of the gallery in the browser's database, blobs in base64."""

OBSERVE = """() => {
  window.seen = [];
  new MutationObserver(changes => {
    for (const { target } of changes) if (target.matches(".tile img") && target.src) window.seen.push(target.src);
  }).observe(document.querySelector("#tiles"), { subtree: true, attributes: true, attributeFilter: ["src"] });
}"""
"""Notes in `window.seen` what pictures the tiles show from now on."""

CONTRASTS = """() => {
  const over = (top, under) => top.map((value, at) => at < 3 ? value * top[3] + under[at] * (1 - top[3]) : 1);
  const parse = text => {
    const [red, green, blue, alpha = 1] = text.match(/[\\d.]+/g).map(Number);
    return [red, green, blue, alpha];
  };
  const ground = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.unshift(parse(getComputedStyle(at).backgroundColor));
    return layers.reduce((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const hex = colour => "#" + colour.slice(0, 3).map(v => Math.round(v).toString(16).padStart(2, "0")).join("");
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()) || element.placeholder;
    if (!own || !element.checkVisibility() || element.closest(":disabled, .hidden")) continue;
    const colour = over(parse(getComputedStyle(element).color), ground(element));
    found.push([element.id || element.className || element.tagName, hex(colour), hex(ground(element))]);
  }
  return found;
}"""
"""[element, colour, ground] of every text that is seen and of every placeholder."""

NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, canvas[tabindex]")]
  .filter(one => one.checkVisibility() && !one.ariaLabel && !one.labels?.length && !one.textContent.trim())
  .filter(one => !one.querySelector("img")?.alt)
  .map(one => one.outerHTML)"""
"""Controls that have no name for a screen reader."""

LOW = """() => [...document.querySelectorAll("button, select, textarea, input")]
  .filter(one => !["range", "radio", "file"].includes(one.type))
  .filter(one => one.checkVisibility() && one.getBoundingClientRect().height < 34)
  .map(one => one.outerHTML)"""
"""Controls that are too low to be hit."""

PAINTED = """canvas => {
  const { width, height } = canvas;
  const alphas = canvas.getContext("2d").getImageData(0, 0, width, height).data.filter((value, at) => at % 4 === 3);
  return alphas.filter(alpha => alpha > 127).length;
}"""
"""Pixels of a mask that are painted."""
