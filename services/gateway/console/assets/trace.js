// One request as a waterfall of its phases, and the steps of it that were sampled.

import { ApiError, call } from "./api.js";
import { el, setText } from "./dom.js";
import { ago, milliseconds } from "./format.js";
import { stepView } from "./steps.js";
import { kindOf, nameOf, readStep, tree } from "./trace_parts.js";

// Spans leave their processes in batches, about a second after a request ended.
const LOOKS = 6;
const BETWEEN_LOOKS_MS = 700;

export class Trace {
  #root = document.getElementById("trace");
  #list = document.getElementById("trace-list");
  #input = document.getElementById("trace-id");
  #abort = null;

  constructor() {
    document.getElementById("trace-form").addEventListener("submit", (event) => {
      event.preventDefault();
      location.hash = `trace=${encodeURIComponent(this.#input.value.trim())}`;
    });
  }

  /** The traces of late, to choose from. */
  async showList() {
    const abort = this.#restart();
    this.#root.replaceChildren();
    try {
      const { json } = await call("v1/traces?limit=20", { signal: abort.signal });
      this.#list.replaceChildren(...listOf(json.traces));
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      this.#list.replaceChildren(el("p", { class: "empty" }, error.message));
    }
  }

  async open(id) {
    const abort = this.#restart();
    this.#input.value = id;
    this.#list.replaceChildren();
    this.#root.replaceChildren(el("p", { class: "empty", role: "status" }, "Looking for the trace …"));
    try {
      const trace = await this.#find(id, abort.signal);
      this.#root.replaceChildren(...traceView(trace));
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      this.#root.replaceChildren(el("div", { class: "empty", role: "alert" },
        el("p", {}, error.message),
        el("button", { type: "button", on: { click: () => this.open(id) } }, "Look again")));
    }
  }

  #restart() {
    this.#abort?.abort();
    return (this.#abort = new AbortController());
  }

  async #find(id, signal) {
    for (let look = 1; ; look += 1) {
      try {
        const trace = (await call(`v1/traces/${encodeURIComponent(id)}`, { signal })).json;
        if (!trace.is_partial || look === LOOKS) return trace;
      } catch (error) {
        if (error.status !== 404 || look === LOOKS) throw error;
      }
      await new Promise((resolve) => setTimeout(resolve, BETWEEN_LOOKS_MS));
      signal.throwIfAborted();
    }
  }
}

function listOf(traces) {
  if (!traces.length) return [el("p", { class: "empty" }, "No trace yet. Run a prompt under Routing, then look here.")];
  const now = Date.now() / 1000;
  const rows = traces.map((trace) => el("tr", { role: "row" },
    el("th", { scope: "row", role: "rowheader", data: { label: "Request" } },
      el("a", { class: "name", href: `#trace=${trace.trace_id}` }, trace.response_id ?? trace.request_id ?? trace.trace_id)),
    el("td", { role: "cell", data: { label: "Began" } }, ago(trace.started_at, now)),
    el("td", { role: "cell", class: "number", data: { label: "Took" } }, milliseconds(trace.duration_ms)),
    el("td", { role: "cell", data: { label: "Status" } }, trace.status === null ? "–" : String(trace.status))));
  const head = ["Request", "Began", "Took", "Status"].map((title) =>
    el("th", { scope: "col", role: "columnheader", class: title === "Took" ? "number" : null }, title));
  return [el("h3", {}, "Latest"), el("table", { class: "list", role: "table", "aria-label": "Latest traces" },
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...head)), el("tbody", { role: "rowgroup" }, ...rows))];
}

function traceView(trace) {
  const rows = tree(trace.spans);
  const end = Math.max(1e-6, trace.duration_ms ?? 0, ...trace.spans.map((span) => span.start_ms + span.duration_ms));
  const steps = trace.steps.map(readStep);
  const title = el("h2", { id: "trace-title" });
  setText(title, `Request ${trace.request_id ?? trace.trace_id}`);
  const note = trace.is_truncated ? " Only the first part is shown: there were more spans than are told." : "";
  return [
    el("section", { class: "panel", "aria-labelledby": "trace-title" },
      el("div", { class: "panel-head" }, title, el("p", { class: "note" }, milliseconds(end))),
      el("p", { class: "note trace-ids" }, "trace ", el("code", {}, trace.trace_id), note),
      waterfall(rows, steps, end)),
    el("section", { class: "panel", "aria-labelledby": "steps-title" },
      el("div", { class: "panel-head" }, el("h2", { id: "steps-title" }, "Sampled steps"), stepLegend()),
      ...(steps.length ? steps.map(stepView) : [el("p", { class: "empty" },
        "None of this request's steps was sampled. EXPERTFLEET_STEP_SAMPLE_INTERVAL=1 samples every step.")])),
  ];
}

function waterfall(rows, steps, end) {
  const head = el("tr", { role: "row" }, ...["Phase", "Where", "Took"].map((text) =>
    el("th", { scope: "col", role: "columnheader", class: text === "Took" ? "number" : null }, text)),
  el("th", { scope: "col", role: "columnheader", class: "axis" }, axis(end)));
  const body = rows.map(({ span, depth }) => {
    const name = el("th", { scope: "row", role: "rowheader" }, el("span", { class: "indent" }), nameOf(span));
    name.style.setProperty("--depth", depth);
    return el("tr", { role: "row", class: span.error ? "failed" : null },
      name,
      el("td", { role: "cell", class: "where" }, span.instance || span.service),
      el("td", { role: "cell", class: "number" }, milliseconds(span.duration_ms)),
      el("td", { role: "cell", class: "lane-cell" }, lane(span, steps, end), ...problems(span)));
  });
  return el("div", { class: "waterfall-scroll" }, el("table", { class: "waterfall", role: "table", "aria-label": "Phases of the request" },
    el("thead", { role: "rowgroup" }, head), el("tbody", { role: "rowgroup" }, ...body)));
}

function lane(span, steps, end) {
  const bar = el("span", { class: `bar ${kindOf(span)}` });
  place(bar, span.start_ms, span.duration_ms, end);
  const marks = span.events.map((event) => {
    const mark = el("span", { class: "event", title: `${event.name} at ${milliseconds(event.at_ms)}` });
    place(mark, event.at_ms, 0, end);
    return mark;
  });
  if (span.name === "expertfleet.shard.generate") {
    for (const step of steps) {
      const mark = el("span", { class: "step-mark", title: `Step ${step.number}, sampled` });
      place(mark, step.start, step.duration, end);
      marks.push(mark);
    }
  }
  return el("span", { class: "lane", "aria-hidden": "true" }, bar, ...marks);
}

function problems(span) {
  const words = span.events.map((event) => `${event.name.replace(/^expertfleet\./, "")} at ${milliseconds(event.at_ms)}`);
  if (span.error) words.unshift(`✕ ${span.error}`);
  return words.length ? [el("span", { class: "detail" }, words.join("; "))] : [];
}

function axis(end) {
  const marks = [0, 0.25, 0.5, 0.75, 1].map((share) => {
    const mark = el("span", {}, milliseconds(end * share));
    mark.style.setProperty("--at", share);
    return mark;
  });
  return el("span", { class: "ticks", "aria-hidden": "true" }, ...marks);
}

function place(element, start, duration, end) {
  element.style.setProperty("--from", Math.max(0, start / end).toFixed(5));
  element.style.setProperty("--size", Math.max(0, duration / end).toFixed(5));
}

function stepLegend() {
  return el("ul", { class: "part-legend", "aria-label": "Parts" }, ...["shard", "wire", "queue", "compute"].map((part) =>
    el("li", {}, el("span", { class: `swatch-part ${part}`, "aria-hidden": "true" }), part)));
}
