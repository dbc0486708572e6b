// Requests to the node that this page is from, with the key if it asks for one.

const STORED = "sllm-key";

export const keepKey = (key) => sessionStorage.setItem(STORED, key);

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function refusal(response) {
  const text = await response.text();
  try {
    return new Refused(response.status, JSON.parse(text).error.message);
  } catch {
    return new Refused(response.status, text.slice(0, 300) || response.statusText);
  }
}

export async function ask(method, path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(STORED);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body), cache: "no-store" });
  if (!response.ok) throw await refusal(response);
  return response;
}

export const call = async (method, path, body) => (await ask(method, path, body)).json();

// Server-sent events, read by hand: EventSource can send no key. Yields { kind, data, comment }.
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) yield eventOf(block);
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

function eventOf(block) {
  const event = { kind: "message", data: "", comment: "" };
  for (const line of block.split("\n")) {
    const place = line.indexOf(":");
    const value = line.slice(place + 1).replace(/^ /, "");
    if (place === 0) event.comment = value;
    else if (line.startsWith("data:")) event.data += value;
    else if (line.startsWith("event:")) event.kind = value;
  }
  return event;
}
