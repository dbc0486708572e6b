// Nodes: whether each is well, and how full.

import { bar, byId, el, keyed, show } from "/page/dom.js";
import { bytes, plural } from "/page/written.js";

const FULL = 0.9;

export function makeNodes() {
  const update = keyed(byId("node-list"), "No node is known yet.", (node) => node.node, makeRow);
  return (state) => {
    const sizes = new Map(state.models.map((model) => [model.fingerprint, model.size_bytes]));
    update(state.nodes.map((node) => ({ ...node, meters: metersOf(node, state, sizes) })));
  };
}

function metersOf(node, state, sizes) {
  const meters = [["places", node.instances, node.slots, `${node.instances} of ${node.slots}`]];
  const own = state.node?.node === node.node ? state.tiers : null;
  const known = node.host_fingerprints.reduce((sum, fingerprint) => sum + (sizes.get(fingerprint) ?? 0), 0);
  const held = own ? own.host_bytes - own.host_free_bytes : known;
  meters.push(["memory", held, node.host_pool_bytes, `${bytes(held)} of ${bytes(node.host_pool_bytes)}`]);
  if (own?.ssd_quota_bytes) {
    meters.push(["disk", own.ssd_used_bytes, own.ssd_quota_bytes, `${bytes(own.ssd_used_bytes)} of ${bytes(own.ssd_quota_bytes)}`]);
  }
  return meters;
}

function conditionOf(node) {
  if (!node.reported) return ["silent", "bad"];
  return node.cordoned ? ["cordoned", "warn"] : ["ready", "good"];
}

function makeRow(first) {
  const facts = el("p", { class: "facts" });
  const state = el("span", {});
  const meters = el("div", { class: "wide" });
  return [el("div", { class: "row" }, facts, state, meters), (node) => {
    const [text, kind] = conditionOf(node);
    show(
      facts,
      el("strong", {}, first.node),
      node.leads ? el("span", { class: "tag" }, "leads") : null,
      el("span", { class: "quiet" }, node.reported ? `${plural(node.active, "stream")}, ${plural(node.checkpoints, "checkpoint")}` : ""),
      node.roles.length < 3 ? el("span", { class: "quiet" }, node.roles.join(", ")) : null,
    );
    show(state, el("span", { class: `state ${kind}` }, text));
    show(meters, node.reported ? node.meters.map(makeMeter) : null);
  }];
}

function makeMeter([name, part, whole, text]) {
  const used = whole ? part / whole : 0;
  return el("div", { class: "meter" }, el("span", { class: "quiet" }, name), bar(0, used, used >= FULL ? "warn" : ""), el("span", {}, text));
}
