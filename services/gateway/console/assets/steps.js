// A sampled step, opened by layer and worker: what went over the wire, queued and was computed.

import { el } from "./dom.js";
import { milliseconds, percent, plural, ranges } from "./format.js";

const PARTS = ["shard", "wire", "queue", "compute"];

/** `step` as `readStep` gives it. */
export function stepView(step) {
  const what = step.numPrefill ? `prefill of ${plural(step.numPrefill, "token")}` : "decode";
  const who = step.numSeqs === null ? "" : `, ${plural(step.numSeqs, "sequence")}`;
  const details = el("details", { class: "step" },
    el("summary", {},
      el("span", { class: "step-name" }, `Step ${step.number ?? "?"}`,
        el("span", { class: "detail" }, `${what}${who}, at ${milliseconds(step.start)}${step.isLinked ? ", shared with another request" : ""}`)),
      el("span", { class: "step-time" }, milliseconds(step.duration)),
      stack(PARTS.map((part) => [part, step.parts[part]]), step.duration),
      el("span", { class: "detail parts" }, PARTS.map((part) =>
        `${part} ${milliseconds(step.parts[part])} (${percent(step.parts[part] / step.duration, 0)})`).join(" · "))));
  // Opened on demand: a model of many layers and workers has thousands of rows.
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(layersView(step));
  });
  return details;
}

function layersView(step) {
  if (!step.layers.length) {
    return el("p", { class: "empty" }, "Its layers were not recorded: the experts run in the shard's own process, or the spans have not arrived.");
  }
  const head = ["Layer", "Worker", "Experts", "Took", "Queue", "Wire", "Compute"].map((title, index) =>
    el("th", { scope: "col", class: index > 2 ? "number" : null }, title));
  const body = [];
  for (const layer of step.layers) {
    const rows = layer.dispatches.length ? layer.dispatches : [null];
    rows.forEach((dispatch, index) => body.push(rowOf(step, layer, dispatch, index === 0 ? rows.length : 0)));
  }
  return el("div", { class: "waterfall-scroll" }, el("table", { class: "plain layers", "aria-label": `Layers of step ${step.number}` },
    el("thead", {}, el("tr", {}, ...head, el("th", { scope: "col", class: "axis" }, "Within the step"))),
    el("tbody", {}, ...body)));
}

function rowOf(step, layer, dispatch, span) {
  const cells = [];
  if (span) {
    cells.push(el("th", { scope: "rowgroup", rowspan: span, title: layer.load.map(([expert, tokens]) => `expert ${expert}: ${plural(tokens, "token")}`).join("\n") },
      String(layer.layer ?? "?"), el("span", { class: "detail" }, milliseconds(layer.duration))));
  }
  if (!dispatch) {
    cells.push(el("td", { colspan: 7, class: "note" }, "in the shard"));
    return el("tr", { class: "first" }, ...cells);
  }
  const retried = dispatch.retries ? ` (attempt ${dispatch.retries + 1})` : "";
  cells.push(
    el("td", {}, `${dispatch.worker}${retried}`, ...(dispatch.error ? [el("span", { class: "detail bad" }, `✕ ${dispatch.error}`)] : [])),
    el("td", {}, ranges([...dispatch.experts].sort((a, b) => a - b)), el("span", { class: "detail" }, dispatch.numTokens === null ? "" : plural(dispatch.numTokens, "token"))),
    ...["duration", "queue", "wire", "compute"].map((part) => el("td", { class: "number" }, milliseconds(dispatch[part]))),
    el("td", { class: "lane-cell" }, lane(step, dispatch)));
  return el("tr", { class: span ? "first" : null }, ...cells);
}

/** The wire is drawn half before and half after: how it divides cannot be known across clocks. */
function lane(step, dispatch) {
  const bar = stack(
    [["wire", dispatch.wire / 2], ["queue", dispatch.queue], ["compute", dispatch.compute], ["wire", dispatch.wire / 2]],
    dispatch.duration);
  bar.style.setProperty("--from", Math.max(0, Math.min(1, (dispatch.start - step.start) / step.duration)).toFixed(5));
  bar.style.setProperty("--size", Math.max(0, Math.min(1, dispatch.duration / step.duration)).toFixed(5));
  return el("span", { class: "lane", "aria-hidden": "true" }, bar);
}

function stack(parts, total) {
  const bar = el("span", { class: "stack", "aria-hidden": "true" });
  for (const [part, value] of parts) {
    const piece = el("i", { class: part });
    piece.style.setProperty("--share", total > 0 ? (value / total).toFixed(5) : 0);
    bar.append(piece);
  }
  return bar;
}
