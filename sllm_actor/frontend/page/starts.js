// Cold starts: what each was made of, as a waterfall, and why it was made where it was.

import { call } from "/page/api.js";
import { bar, byId, el, keyed, show } from "/page/dom.js";
import { bytes, percent, seconds, shortId } from "/page/written.js";
import { nowOf } from "/page/watch.js";

const SHOWN = 6;

export function makeStarts() {
  const update = keyed(byId("start-list"), "No model has been started for a request yet.", (one) => one.request_id, makeStart);
  return (state) => {
    const now_s = nowOf(state.clock);
    const loading = new Map(state.models.map((model) => [model.name, model]));
    const cold = state.requests.filter((one) => one.cold).sort((a, b) => b.arrived_s - a.arrived_s);
    update(cold.slice(0, SHOWN).map((one) => ({ ...one, now_s, loading: loading.get(one.model) })));
  };
}

export const isStarting = (one) => one.outcome === "running" && !one.first_token_s;

function makeStart(first) {
  const total = el("span", {});
  const where = el("span", { class: "tag" });
  const head = el("div", { class: "start-head" }, el("h3", {}, first.model), where, total,
    el("span", { class: "id quiet", title: first.request_id }, shortId(first.request_id)));
  const fall = el("ol", { class: "fall", "aria-label": `Parts of the start of ${first.model}` });
  const why = makeWhy(first.request_id);
  return [el("article", { class: "row", "data-start": first.request_id }, el("div", { class: "wide" }, head, fall, why)), (one) => {
    const end_s = one.first_token_s || one.end_s || one.now_s;
    const took_s = Math.max(end_s - one.arrived_s, 0.001);
    const going = isStarting(one);
    where.textContent = placedAt(one) || one.node || "no place yet";
    const result = one.first_token_s ? `first token after ${seconds(took_s)}` : `${one.outcome} after ${seconds(took_s)}`;
    show(total, el("span", { class: going ? "state busy" : one.first_token_s ? "" : "state bad" }, going ? `starting for ${seconds(took_s)}` : result));
    show(fall, rowsOf(one, took_s, going));
  }];
}

const placedAt = (one) => one.spans.find((span) => span.name === "placement")?.tier;

function rowsOf(one, took_s, going) {
  const at = (moment_s) => (moment_s - one.arrived_s) / took_s;
  const spans = one.spans.filter((span) => span.name !== "migration" && span.begin_s <= one.arrived_s + took_s);
  const rows = spans.map((span) => row(
    span.name, span.tier, bar(at(span.begin_s), at(span.end_s)),
    seconds(span.end_s - span.begin_s) + (span.size_bytes ? `, ${bytes(span.size_bytes)}` : ""),
  ));
  if (going) {
    const last_s = Math.max(one.arrived_s, ...spans.map((span) => span.end_s));
    const model = one.loading;
    const text = model?.state === "loading" && model.loading_bytes ? `${percent(model.loading_bytes, model.size_bytes)} loaded` : "under way";
    rows.push(row("going", "", bar(at(last_s), 1), text));
  }
  return rows;
}

function row(name, tier, drawn, text) {
  return el("li", { class: name.replace(/[^a-z]/g, "") }, el("span", {}, name === "going" ? "…" : name, tier ? el("span", { class: "quiet" }, ` ${tier}`) : ""), drawn, el("span", {}, text));
}

function makeWhy(id) {
  const told = el("div", { class: "why" });
  return el("details", {
    ontoggle: async (event) => {
      if (!event.target.open) return;
      try {
        show(told, explained(await call("GET", `/admin/explain/${encodeURIComponent(id)}`)));
      } catch (error) {
        told.textContent = error.message;
      }
    },
  }, el("summary", { "aria-label": `Why ${id} was placed there` }, "Why there"), told);
}

function explained(answer) {
  const decision = answer.decision;
  const parts = [el("p", {}, answer.text)];
  if (!decision) return parts;
  const facts = [`policy ${decision.policy}`, `foreseen ${seconds(decision.predicted_s)}`];
  if (decision.observed_s) facts.push(`took ${seconds(decision.observed_s)}`);
  if (decision.flip) facts.push(decision.flip.text);
  parts.push(el("p", { class: "quiet" }, facts.join("; ")));
  const rows = decision.candidates.map((one) => el(
    "tr", { class: one.node === decision.chosen?.node && one.action === decision.chosen?.action ? "chosen" : "" },
    el("td", {}, one.node), el("td", {}, one.possible ? one.action : "not possible"), el("td", {}, one.tier),
    el("td", {}, one.possible ? seconds(one.estimate_s) : "–"),
    el("td", {}, one.terms.map((term) => `${term.name} ${seconds(term.seconds)}`).join(", ")),
  ));
  const titles = ["node", "action", "from", "estimate", "made of"].map((text) => el("th", { scope: "col" }, text));
  parts.push(el("table", {}, el("thead", {}, el("tr", {}, titles)), el("tbody", {}, rows)));
  return parts;
}
