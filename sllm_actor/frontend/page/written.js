// Numbers as people read them, with their units.

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  let value = count;
  while (value >= 1000 && place < units.length - 1) {
    value /= 1000;
    place += 1;
  }
  return `${place && value < 10 ? value.toFixed(1) : Math.round(value)} ${units[place]}`;
}

export function seconds(value) {
  if (value < 0.001) return `${Math.round(value * 1e6)} µs`;
  if (value < 1) return `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 100) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  return `${Math.round(value / 60)} min`;
}

export const count = (value) => value.toLocaleString("en");
export const rate = (value) => (value < 10 ? value.toFixed(1) : count(Math.round(value)));
export const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");
export const shortId = (id) => (id.length > 14 ? `${id.slice(0, 13)}…` : id);
export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
