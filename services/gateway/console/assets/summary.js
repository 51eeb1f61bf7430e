// The line of figures that a person reads first.

import { el, setText, svg } from "./dom.js";
import { count, percentiles, short } from "./format.js";

const NUM_POINTS = 120;
const WIDTH = 120;
const HEIGHT = 28;

const FIGURES = [
  { name: "rate", label: "Tokens/s through the model" },
  { name: "requests", label: "Requests running" },
  { name: "ttft", label: "Time to first token" },
  { name: "tpot", label: "Time per token" },
  { name: "workers", label: "Workers ready" },
  { name: "sessions", label: "Sessions stored" },
];

export class Summary {
  #figures = {};
  #line = svg("polyline", { points: "" });
  #rates = [];

  constructor() {
    const root = document.getElementById("summary");
    for (const { name, label } of FIGURES) {
      const value = el("span", { class: "figure", data: { figure: name } }, "–");
      const detail = el("span", { class: "detail" });
      this.#figures[name] = { value, detail };
      root.append(el("div", {}, el("dt", {}, label), el("dd", {}, value, " ", detail)));
    }
    this.#figures.rate.value.after(
      svg("svg", { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" }, this.#line));
  }

  show(view) {
    const rate = modelRate(view);
    this.#draw(rate);
    this.#set("rate", short(rate));
    const { running, waiting, ttft_ms: ttft, tpot_ms: tpot } = view.requests;
    this.#set("requests", count(running), waiting ? `${count(waiting)} waiting` : "");
    for (const [name, value] of [["ttft", ttft], ["tpot", tpot]]) {
      const known = percentiles(value);
      this.#set(name, known ? known.usual : "–", known ? `p95 ${known.high}` : "");
    }
    const ready = view.workers.filter((worker) => worker.state === "ready").length;
    const lost = view.workers.filter((worker) => worker.state === "lost").length;
    this.#set("workers", view.workers.length ? count(ready) : "none", lost ? `✕ ${lost} lost` : "");
    this.#figures.workers.detail.classList.toggle("bad", lost > 0);
    this.#set("sessions", count(view.sessions.stored));
  }

  #set(name, value, detail = "") {
    setText(this.#figures[name].value, value);
    setText(this.#figures[name].detail, detail);
  }

  #draw(rate) {
    this.#rates.push(rate ?? 0);
    if (this.#rates.length > NUM_POINTS) this.#rates.shift();
    const top = Math.max(...this.#rates, 1);
    const first = NUM_POINTS - this.#rates.length;
    const points = this.#rates.map((value, index) => {
      const x = ((first + index) / (NUM_POINTS - 1)) * WIDTH;
      return `${x.toFixed(1)},${(HEIGHT - 1 - (value / top) * (HEIGHT - 2)).toFixed(1)}`;
    });
    this.#line.setAttribute("points", points.join(" "));
  }
}

/** Every token visits `num_experts_per_tok` experts in each layer. */
function modelRate({ load, model }) {
  const layers = load.layers.filter((layer) => layer.now);
  if (!layers.length) return null;
  const visits = layers.reduce((sum, layer) => sum + layer.now.reduce((a, b) => a + b, 0), 0);
  return visits / layers.length / (model.num_experts_per_tok || 1);
}
