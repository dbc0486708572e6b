// Ties the parts together: events come in, each part that shows what has changed is brought up to date.

import { keepKey } from "/page/api.js";
import { makeCharts, Rates } from "/page/charts.js";
import { byId, el, show } from "/page/dom.js";
import { makeModels } from "/page/models.js";
import { makeNodes } from "/page/nodes.js";
import { makePlayground } from "/page/playground.js";
import { isStarting, makeStarts } from "/page/starts.js";
import { makeMoves, makeStreams } from "/page/streams.js";
import { nowOf, watch } from "/page/watch.js";
import { bytes, count, rate, seconds } from "/page/written.js";

const TICK_MS = 250;
const rates = new Rates();
const drawCharts = makeCharts(rates);
const complain = (error) => notice(error.message);
const views = [
  [makeModels(complain), ["models", "instances", "nodes"]],
  [makeNodes(), ["nodes", "tiers", "models", "node"]],
  [makePlayground(), ["models"]],
  [makeStreams(), ["requests", "nodes"]],
  [makeMoves(), ["requests"]],
  [makeStarts(), ["requests", "models"]],
];
const moving = [views[3][0], views[5][0]];
let shown = null;
let ticks = 0;

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

function health(text, kind) {
  const pill = byId("health");
  if (pill.textContent !== text) pill.textContent = text;
  pill.className = `pill ${kind}`;
}

function changed(state, names) {
  shown = state;
  if (names.has("requests")) rates.take(state);
  for (const [update, parts] of views) if (parts.some((part) => names.has(part))) update(state);
  byId("node").textContent = `${state.node.node} · ${state.node.version}`;
  document.title = `${state.node.node} · sllm_actor`;
  const problems = Object.entries(state.problems).map(([part, why]) => `${part}: ${why}`);
  const silent = state.nodes.filter((node) => !node.reported).map((node) => node.node);
  if (!state.node.ready) health("not ready", "warn");
  else if (problems.length || silent.length) health("degraded", "warn");
  else health("healthy", "good");
  if (silent.length) problems.push(`nothing is heard of ${silent.join(", ")}`);
  notice(problems.join("; "));
  figures(state);
}

function figures(state) {
  const running = state.requests.filter((one) => one.outcome === "running");
  const starting = running.filter(isStarting).length;
  const waiting = Object.values(state.node.waiting).reduce((sum, one) => sum + one, 0);
  const places = state.nodes.reduce((sum, node) => sum + node.slots, 0);
  const failed = Object.values(state.node.failed_starts).reduce((sum, one) => sum + one, 0);
  const median_s = rates.medianFirst_s();
  const held = state.tiers ? state.tiers.host_bytes - state.tiers.host_free_bytes : 0;
  const all = [
    ["streams", count(running.length)],
    ["wait for a start", count(Math.max(waiting, starting)), starting ? "busy" : ""],
    ["instances", `${state.instances.length} of ${places}`, places && state.instances.length >= places ? "warn" : ""],
    ["memory held here", state.tiers ? bytes(held) : "–"],
    ["tokens per second", rate(rates.tokensPerS(nowOf(state.clock)))],
    ["median first token", median_s === null ? "–" : seconds(median_s)],
    ["moved", count(state.node.migrations.moved ?? 0)],
    ["failed starts", count(failed), failed ? "bad" : ""],
  ];
  show(byId("figures"), all.map(([name, value, kind]) => el("div", {}, el("dt", {}, name), el("dd", { class: kind || "" }, value))));
}

function told(condition, message) {
  if (condition === "connected") return;
  health("not connected", "bad");
  notice(message);
}

function askKey(message) {
  const dialog = byId("key-dialog");
  const form = byId("key-form");
  byId("key-why").textContent = message;
  dialog.showModal();
  return new Promise((resolve) => {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      keepKey(form.elements.key.value.trim());
      form.reset();
      dialog.close();
      resolve();
    }, { once: true });
  });
}

// Without a key there is nothing to show: the dialog is not to be left.
byId("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
setInterval(() => {
  if (!shown || document.hidden) return;
  ticks += 1;
  const isGoing = shown.requests.some((one) => one.outcome === "running");
  if (isGoing) for (const update of moving) update(shown);
  if (ticks % 4 === 0) {
    drawCharts(nowOf(shown.clock));
    figures(shown);
    views[4][0](shown);
  }
}, TICK_MS);
watch({ changed, told, askKey });
