// The slowest requests of late, each with the way to its trace.

import { el, setText } from "./dom.js";
import { ago, count, seconds } from "./format.js";
import { LiveTable, meter } from "./table.js";

const COLUMNS = [
  { title: "Request" },
  { title: "Took", class: "wide" },
  { title: "First token", class: "number" },
  { title: "Prompt", class: "number" },
  { title: "Generated", class: "number" },
  { title: "Status" },
];

export class SlowRequests {
  #view = null;
  #at = 0;
  #table = new LiveTable(document.getElementById("slow"), {
    label: "Slow requests",
    columns: COLUMNS,
    key: (request) => request.request_id,
    create: (cells, request) => cells[0].append(this.#link(request), el("span", { class: "detail" })),
    update: (cells, request) => this.#update(cells, request),
    empty: "No request in the last 10 minutes.",
  });

  /** `at`: Unix seconds now, by the gateway's clock. */
  show(view, at) {
    this.#view = view;
    this.#at = at;
    this.#table.show(view.slow_requests);
  }

  #update(cells, request) {
    const { slow_requests: all } = this.#view;
    setText(cells[0].lastChild, ago(request.started_at, this.#at));
    const text = seconds(request.duration_s);
    if (cells[1].dataset.text !== text + all[0].duration_s) {
      cells[1].dataset.text = text + all[0].duration_s;
      cells[1].replaceChildren(meter(request.duration_s / all[0].duration_s, text));
    }
    setText(cells[2], seconds(request.ttft_s));
    setText(cells[3], count(request.num_prompt_tokens));
    setText(cells[4], count(request.num_generated_tokens));
    const status = String(request.status);
    setText(cells[5], status);
    cells[5].classList.toggle("bad", !/^(2\d\d|ok|completed|stop|length)$/.test(status));
  }

  #link({ request_id: id, trace_id: trace }) {
    if (!trace) return el("span", { class: "name", title: "This request was not traced" }, shorten(id));
    const outside = outsideUrl(this.#view.trace_url, trace);
    return outside
      ? el("a", { class: "name", href: outside, target: "_blank", rel: "noopener noreferrer" }, shorten(id))
      : el("a", { class: "name", href: `#trace=${encodeURIComponent(trace)}` }, shorten(id));
  }
}

/** The address in the operator's own trace store; only http and https are followed. */
function outsideUrl(template, trace) {
  if (!template) return null;
  try {
    const url = new URL(template.replaceAll("{trace_id}", encodeURIComponent(trace)));
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}

function shorten(id) {
  return id.length > 20 ? `${id.slice(0, 12)}…${id.slice(-4)}` : id;
}
