// Throughput and latency over the last minutes, drawn from the requests that the page is told of.

import { byId, el, svg } from "/page/dom.js";
import { rate, seconds } from "/page/written.js";
import { nowOf } from "/page/watch.js";

const WINDOW_S = 300;
const STEP_S = 2;
const HEIGHT = 100;

export class Rates {
  constructor() {
    this.seen = new Map();
    // Tokens by the number of the step in which they came, and first tokens by request.
    this.steps = new Map();
    this.firsts = new Map();
    this.begun_s = null;
  }

  // What an answer has more tokens than when it was last looked at, has come in this step.
  take(state) {
    const now_s = nowOf(state.clock);
    const step = Math.floor(now_s / STEP_S);
    const isFirst = this.begun_s === null;
    this.begun_s ??= now_s;
    const seen = new Map();
    for (const one of state.requests) {
      const before = this.seen.get(one.request_id) ?? (isFirst ? one.generated_tokens : 0);
      const more = one.generated_tokens - before;
      if (more > 0) this.steps.set(step, (this.steps.get(step) ?? 0) + more);
      seen.set(one.request_id, one.generated_tokens);
      if (one.first_token_s) {
        this.firsts.set(one.request_id, { at_s: one.first_token_s, took_s: one.first_token_s - one.arrived_s, cold: one.cold });
      }
    }
    this.seen = seen;
    this.forget(now_s);
  }

  forget(now_s) {
    for (const step of this.steps.keys()) if (step * STEP_S < now_s - WINDOW_S) this.steps.delete(step);
    for (const [id, first] of this.firsts) if (first.at_s < now_s - WINDOW_S) this.firsts.delete(id);
  }

  // Of the last whole step.
  tokensPerS(now_s) {
    return (this.steps.get(Math.floor(now_s / STEP_S) - 1) ?? 0) / STEP_S;
  }

  medianFirst_s() {
    const sorted = [...this.firsts.values()].map((first) => first.took_s).sort((a, b) => a - b);
    return sorted.length ? sorted[Math.floor((sorted.length - 1) / 2)] : null;
  }
}

export function makeCharts(rates) {
  const tokens = makeChart("Tokens per second", []);
  const first = makeChart("Time to first token", [
    el("span", { class: "key-cold" }, "▮ cold"), " ", el("span", { class: "key-warm" }, "▮ warm"),
  ]);
  byId("charts").append(tokens.element, first.element);
  return (now_s) => {
    drawTokens(tokens, rates, now_s);
    drawFirsts(first, rates, now_s);
  };
}

function makeChart(title, key) {
  const drawing = svg("svg", { viewBox: `0 0 ${WINDOW_S} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title });
  const most = el("span", {});
  const element = el("div", { class: "chart" },
    el("p", { class: "between" }, el("span", {}, title, " ", key), most), drawing,
    el("p", { class: "between", "aria-hidden": "true" }, el("span", {}, "5 min ago"), el("span", {}, "now")));
  return { element, drawing, most, title };
}

function drawTokens(chart, rates, now_s) {
  const last = Math.floor(now_s / STEP_S) - 1;
  const begun = Math.max(Math.floor(rates.begun_s / STEP_S), last - WINDOW_S / STEP_S);
  const values = [];
  for (let step = begun; step <= last; step += 1) values.push([step, (rates.steps.get(step) ?? 0) / STEP_S]);
  const most = Math.max(1, ...values.map(([, value]) => value));
  const x = (step) => WINDOW_S - (last - step) * STEP_S;
  const points = values.map(([step, value]) => `${x(step)},${HEIGHT - (HEIGHT * value) / most}`);
  const area = values.length ? [`${x(begun)},${HEIGHT}`, ...points, `${WINDOW_S},${HEIGHT}`] : [];
  chart.drawing.replaceChildren(svg("polygon", { points: area.join(" ") }), svg("polyline", { points: points.join(" ") }));
  label(chart, `up to ${rate(most)}/s`, rates.steps.size);
}

function drawFirsts(chart, rates, now_s) {
  const firsts = [...rates.firsts.values()];
  const most = Math.max(0.001, ...firsts.map((first) => first.took_s));
  chart.drawing.replaceChildren(...firsts.map((first) => {
    const x = WINDOW_S - (now_s - first.at_s);
    return svg("line", { x1: x, x2: x, y1: HEIGHT, y2: HEIGHT - Math.max(3, (HEIGHT * first.took_s) / most), class: first.cold ? "cold" : "" });
  }));
  label(chart, `up to ${seconds(most)}`, firsts.length);
}

function label(chart, text, known) {
  chart.most.textContent = known ? text : "nothing yet";
  chart.drawing.setAttribute("aria-label", `${chart.title}: ${chart.most.textContent}`);
}
