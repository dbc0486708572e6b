// What the node tells of itself, kept up to date for as long as the page is open.

import { ask, eventsOf, Refused } from "/page/api.js";

const LONGEST_WAIT_MS = 5000;
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Calls `changed(state, names)` after each event and `told(condition, message)` when the connection comes or goes;
// `askKey(message)` is awaited where a key is missing or may not do this.
export async function watch({ changed, told, askKey }) {
  const state = { models: [], nodes: [], instances: [], requests: [], tiers: null, node: null, problems: {}, clock: null };
  let waitMs = 250;
  for (;;) {
    try {
      const response = await ask("GET", "/admin/events");
      for await (const event of eventsOf(response)) {
        if (!event.data) continue;
        const content = JSON.parse(event.data);
        if (event.kind === "error") throw new Refused(503, content.error.message);
        waitMs = 250;
        Object.assign(state, content.parts);
        // The node's monotonic clock, as timelines have it, against ours.
        state.clock = { ...content.moment, here_ms: performance.now() };
        told("connected", "");
        changed(state, new Set(Object.keys(content.parts)));
      }
      told("lost", "The node has ended the connection; trying again.");
    } catch (error) {
      if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
        told("lost", "");
        await askKey(error.message);
        waitMs = 250;
        continue;
      }
      told("lost", error instanceof Refused ? error.message : "The node does not answer; trying again.");
    }
    await wait(waitMs);
    waitMs = Math.min(2 * waitMs, LONGEST_WAIT_MS);
  }
}

export const nowOf = (clock) => clock.monotonic_s + (performance.now() - clock.here_ms) / 1000;
