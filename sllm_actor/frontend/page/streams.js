// Running streams, each with a button that moves it to another node; and the moves that there were.

import { call } from "/page/api.js";
import { byId, el, keyed, show } from "/page/dom.js";
import { bytes, count, plural, rate, seconds, shortId } from "/page/written.js";
import { nowOf } from "/page/watch.js";

const SHOWN_MOVES = 12;

export function makeStreams() {
  const update = keyed(byId("stream-list"), "Nothing is being answered.", (one) => one.request_id, makeRow);
  return (state) => {
    const now_s = nowOf(state.clock);
    const workers = state.nodes.filter((node) => node.reported && !node.cordoned && node.roles.includes("worker"));
    const running = state.requests.filter((one) => one.outcome === "running");
    update(running.map((one) => ({
      ...one,
      since_s: now_s - (one.first_token_s || one.arrived_s),
      others: workers.map((node) => node.node).filter((name) => name !== one.node),
    })));
  };
}

function makeRow(first) {
  const id = first.request_id;
  const facts = el("p", { class: "facts quiet wide" });
  const where = el("span", { class: "tag on" });
  const to = el("select", { "aria-label": `Where ${id} is to go on` });
  const move = el("button", { type: "button", "aria-label": `Move ${id}`, onclick: () => moveTo(id, to.value, move) }, "Move");
  const head = el("p", { class: "facts" }, el("strong", {}, first.model), where);
  const row = el("div", { class: "row", "data-request": id }, head, el("span", { class: "buttons" }, to, move), facts);
  let offered = "";
  return [row, (one) => {
    where.textContent = one.node ? `at ${one.node}` : "waits for its start";
    if (offered !== one.others.join()) {
      offered = one.others.join();
      to.replaceChildren(...one.others.map((name) => el("option", { value: name }, `to ${name}`)));
    }
    to.hidden = move.hidden = !one.others.length || !one.first_token_s;
    show(
      facts,
      el("span", { class: "id", title: id }, shortId(id)),
      el("span", {}, plural(one.generated_tokens, "token")),
      one.first_token_s && one.since_s > 0 ? el("span", {}, `${rate(one.generated_tokens / one.since_s)} tokens/s`) : null,
      el("span", {}, one.first_token_s ? `first after ${seconds(one.first_token_s - one.arrived_s)}` : `for ${seconds(one.since_s)}`),
    );
  }];
}

async function moveTo(id, to, button) {
  const status = byId("move-status");
  status.textContent = `${shortId(id)} is being moved to ${to} …`;
  button.disabled = true;
  try {
    const moved = await call("POST", `/admin/requests/${encodeURIComponent(id)}/migrate`, { to });
    status.textContent = `${shortId(id)} goes on at ${moved.node}: ${plural(moved.tokens, "token")}, ` +
      `${bytes(moved.bytes_moved)}, ${plural(moved.rounds, "round")}.`;
  } catch (error) {
    status.textContent = error.message;
  } finally {
    button.disabled = false;
  }
}

export function makeMoves() {
  const update = keyed(byId("move-list"), "No stream has moved.", (move) => move.key, makeMove);
  return (state) => {
    const now_s = nowOf(state.clock);
    const moves = state.requests.flatMap((one) => movesOf(one, now_s));
    moves.sort((a, b) => a.ago_s - b.ago_s);
    update(moves.slice(0, SHOWN_MOVES));
  };
}

// A request's spans name where each move led; what came before is where it was placed.
function movesOf(one, now_s) {
  let at = one.spans.find((span) => span.name === "placement")?.tier ?? "";
  return one.spans.filter((span) => span.name === "migration").map((span) => {
    const from = at;
    at = span.tier;
    const took_s = span.end_s - span.begin_s;
    return { key: `${one.request_id} ${span.begin_s}`, one, from, to: span.tier, took_s, ago_s: now_s - span.end_s };
  });
}

function makeMove(first) {
  const ago = el("span", { class: "quiet" });
  const way = first.from ? `${first.from} → ${first.to}` : `→ ${first.to}`;
  const facts = el("p", { class: "facts" }, el("strong", {}, way), el("span", {}, first.one.model));
  const more = el("p", { class: "facts quiet wide" });
  return [el("div", { class: "row" }, facts, ago, more), (move) => {
    ago.textContent = `${seconds(Math.max(move.ago_s, 0.001))} ago`;
    show(
      more,
      el("span", { class: "id" }, shortId(move.one.request_id)),
      el("span", {}, `ready in ${seconds(move.took_s)}`),
      el("span", {}, `${move.one.outcome}, ${count(move.one.generated_tokens)} tokens`),
    );
  }];
}
