/** The endpoint's HTTP API. Addresses are relative to the page, so that it works below any prefix. */

const KEY = "gtl-api-key";
const LONGEST = 300;

/** What the endpoint refused or could not do, in one line. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    const line = String(message).replace(/\s+/g, " ").trim();
    super(line.length > LONGEST ? `${line.slice(0, LONGEST)}…` : line);
    this.status = status;
    this.param = param;
  }
}

export const savedKey = () => sessionStorage.getItem(KEY);

export function saveKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export async function listModels() {
  return (await (await request("v1/models")).json()).data;
}

export async function readCard(name, version) {
  const query = version ? `?${new URLSearchParams({ version })}` : "";
  return (await request(`v1/adapters/${encodeURIComponent(name)}${query}`)).json();
}

/** Events of a picture in the making: partial images, then the completed one. `body`: an object or a FormData. */
export async function* pictureEvents(path, body, signal) {
  const isForm = body instanceof FormData;
  const response = await request(path, {
    method: "POST",
    body: isForm ? body : JSON.stringify(body),
    headers: { Accept: "text/event-stream", ...(isForm ? {} : { "Content-Type": "application/json" }) },
    signal,
  });
  for await (const { event, data } of serverEvents(response.body)) {
    if (event === "error" || data.error) throw errorOf(data, response);
    yield data;
    if (data.type.endsWith(".completed")) return;
  }
  throw new ApiError("The endpoint broke off before the picture was finished.");
}

async function request(path, options = {}) {
  const key = savedKey();
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The endpoint does not answer.");
  }
  if (response.ok) return response;
  throw errorOf(await response.json().catch(() => ({})), response);
}

function errorOf(data, { status, headers }) {
  const wait = headers.get("Retry-After");
  const plain = `The endpoint answered ${status}.${wait ? ` Try again in ${wait} s.` : ""}`;
  const { message = plain, param = null } = data.error ?? data;
  return new ApiError(message, { status, param });
}

/** Server-sent events of a body, with their JSON data. */
async function* serverEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(brokenOff);
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const found = parseEvent(block);
        if (found) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // of a reader whose request was given up, which says so once more
  }
}

function brokenOff(error) {
  if (error.name === "AbortError") throw error;
  throw new ApiError("The connection broke off before the picture was finished.");
}

function parseEvent(block) {
  let event = "message";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  const text = data.join("\n");
  return text && text !== "[DONE]" ? { event, data: JSON.parse(text) } : null;
}

/** The bytes of an event's picture. */
export function pictureOf({ b64_json: base64, output_format: format = "png" }) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type: `image/${format}` });
}
