// Models by tier and node: what each is doing, and where its bytes are.

import { call } from "/page/api.js";
import { bar, byId, el, keyed, show } from "/page/dom.js";
import { bytes, percent, plural } from "/page/written.js";

const KINDS = { running: "good", loading: "busy", starting: "busy", failed: "bad" };

export function makeModels(complain) {
  const update = keyed(byId("model-list"), "None is registered yet.", (model) => model.name, (model) => makeRow(model, complain));
  const form = byId("deploy-form");
  const status = byId("deploy-status");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const { source, name } = Object.fromEntries(new FormData(form));
    status.textContent = `Checking ${source} …`;
    try {
      const { model } = await call("POST", "/admin/models", { source, name });
      status.textContent = `${model.name} is registered: ${model.architecture}, ${bytes(model.size_bytes)}.`;
      form.reset();
    } catch (error) {
      status.textContent = error.message;
    }
  });
  return (state) => update(state.models.map((model) => ({ ...model, places: placesOf(model, state) })));
}

// Where a model is, nearest tier first; of other nodes than this one no more is known than that they have it.
function placesOf(model, state) {
  const places = [];
  const running = new Map();
  for (const one of state.instances) {
    if (one.model === model.name) running.set(one.node, (running.get(one.node) ?? 0) + 1);
  }
  for (const [node, instances] of running) places.push([instances > 1 ? `runs at ${node} × ${instances}` : `runs at ${node}`, true]);
  for (const node of state.nodes) {
    if (node.starting.includes(model.name)) places.push([`starts at ${node.node}`, true]);
    if (node.host_fingerprints.includes(model.fingerprint)) places.push([`memory of ${node.node}`, false]);
    else if (node.ssd_fingerprints.includes(model.fingerprint)) places.push([`disk of ${node.node}`, false]);
  }
  return places;
}

// Names may have slashes.
const pathOf = (name) => name.split("/").map(encodeURIComponent).join("/");

function makeRow(first, complain) {
  const state = el("span", {});
  const facts = el("p", { class: "facts quiet wide" });
  const load = el("div", { class: "wide" });
  const unload = el("button", {
    type: "button",
    "aria-label": `Unload ${first.name}`,
    onclick: () => call("POST", `/admin/models/${pathOf(first.name)}/unload`).catch(complain),
  }, "Unload");
  const head = el("p", { class: "facts" }, el("strong", {}, first.name), state);
  const row = el("div", { class: "row", "data-model": first.name }, head, unload, facts, load);
  return [row, (model) => {
    show(state, el("span", { class: `state ${KINDS[model.state] ?? ""}` }, model.state));
    unload.disabled = !model.instances && model.state !== "loading";
    show(
      facts,
      el("span", {}, model.base ? `adapter of ${model.base}` : `${bytes(model.size_bytes)} ${model.dtype}`),
      model.instances > 1 ? el("span", {}, plural(model.instances, "instance")) : null,
      model.places.map(([text, on]) => el("span", { class: on ? "tag on" : "tag" }, text)),
    );
    const arrived = model.state === "loading" && model.size_bytes ? model.loading_bytes / model.size_bytes : 0;
    show(load, arrived ? el("div", { class: "meter" }, "loading", bar(0, arrived), percent(arrived, 1)) : null);
  }];
}
