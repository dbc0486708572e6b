// A chat with a model, token by token, through the same endpoint that every client uses.

import { ask, eventsOf } from "/page/api.js";
import { byId, el } from "/page/dom.js";
import { plural, rate, seconds } from "/page/written.js";

export function makePlayground() {
  const form = byId("play-form");
  const talk = byId("talk");
  const status = byId("play-status");
  const stop = byId("play-stop");
  const turns = [];
  let running = null;
  let models = new Map();

  const say = (text, kind) => {
    const line = el("p", { class: kind }, text);
    talk.append(line);
    talk.scrollTop = talk.scrollHeight;
    return line;
  };
  const send = async () => {
    const model = models.get(form.elements.model.value);
    const prompt = form.elements.prompt.value;
    if (running || !prompt.trim()) return;
    if (!model) {
      status.textContent = "There is no model to ask yet: deploy one.";
      return;
    }
    running = new AbortController();
    stop.disabled = false;
    form.elements.prompt.value = "";
    say(prompt, "asked");
    turns.push({ role: "user", content: prompt });
    const line = say("", "answered");
    const answer = { text: "", note: (text) => { status.textContent = text; }, add: (text) => {
      line.append(text);
      talk.scrollTop = talk.scrollHeight;
    } };
    try {
      await stream(model, turns, prompt, answer, running.signal);
      turns.push({ role: "assistant", content: answer.text });
    } catch (error) {
      // What has no answer is not part of the conversation.
      turns.pop();
      if (error.name === "AbortError") {
        status.textContent = "Stopped.";
      } else {
        line.classList.add("failed");
        line.append(error.message);
      }
      if (!line.textContent) line.remove();
    } finally {
      running = null;
      stop.disabled = true;
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  form.elements.prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  stop.addEventListener("click", () => running?.abort());
  byId("play-clear").addEventListener("click", () => {
    running?.abort();
    turns.length = 0;
    talk.replaceChildren();
    status.textContent = "";
  });
  return (state) => {
    const generating = state.models.filter((model) => model.generates);
    if ([...models.keys()].join() !== generating.map((model) => model.name).join()) {
      const before = form.elements.model.value;
      form.elements.model.replaceChildren(...generating.map((model) => el("option", { value: model.name }, model.name)));
      if (generating.some((model) => model.name === before)) form.elements.model.value = before;
    }
    models = new Map(generating.map((model) => [model.name, model]));
  };
}

async function stream(model, turns, prompt, answer, signal) {
  const begun_ms = performance.now();
  const options = { model: model.name, stream: true, stream_options: { include_usage: true } };
  answer.note(`Asking ${model.name} …`);
  const response = model.chat
    ? await ask("POST", "/v1/chat/completions", { ...options, messages: turns }, signal)
    : await ask("POST", "/v1/completions", { ...options, prompt }, signal);
  let first_ms = null;
  let usage = null;
  for await (const event of eventsOf(response)) {
    if (event.comment && first_ms === null) answer.note(`${event.comment} …`);
    if (!event.data || event.data === "[DONE]") continue;
    const content = JSON.parse(event.data);
    if (content.error) throw new Error(content.error.message);
    usage = content.usage ?? usage;
    const text = content.choices?.[0]?.delta?.content ?? content.choices?.[0]?.text ?? "";
    if (!text) continue;
    if (first_ms === null) {
      first_ms = performance.now();
      answer.note(`First text after ${seconds((first_ms - begun_ms) / 1000)}.`);
    }
    answer.text += text;
    answer.add(text);
  }
  const took_s = (performance.now() - (first_ms ?? begun_ms)) / 1000;
  const tokens = usage?.completion_tokens ?? 0;
  const first = first_ms === null ? "No text" : `First text after ${seconds((first_ms - begun_ms) / 1000)}`;
  answer.note(`${first}; ${plural(tokens, "token")}, ${rate(tokens / Math.max(took_s, 0.001))} a second.`);
}
