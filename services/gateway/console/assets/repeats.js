// How often neighbouring tokens go to the same expert, layer by layer, against chance.

import { el, setText, svg } from "./dom.js";
import { percent } from "./format.js";

const WIDTH = 720;
const HEIGHT = 200;
const LEFT = 44;
const RIGHT = 92; // room for the word at the line of chance
const BOTTOM = 24;
const TOP = 10;

export class Repeats {
  #root = document.getElementById("repeats");
  #onLayer;
  #choices = null;
  #kind = "first";
  #layer = 0;

  constructor({ onLayer }) {
    this.#onLayer = onLayer;
    for (const radio of document.querySelectorAll("input[name=repeat]")) {
      radio.addEventListener("change", () => {
        this.#kind = radio.value;
        if (this.#choices) this.#draw();
      });
    }
  }

  show(choices) {
    this.#choices = choices;
    this.#draw();
  }

  setLayer(layer) {
    this.#layer = layer;
    for (const bar of this.#root.querySelectorAll("[data-layer]")) {
      bar.classList.toggle("here", Number(bar.dataset.layer) === layer);
    }
  }

  #draw() {
    const { repeats } = this.#choices;
    const shares = repeats.map((layer) => layer[this.#kind]);
    if (shares.every((share) => share === null)) {
      this.#root.replaceChildren(el("p", { class: "empty" }, "Neighbours need two tokens: give a longer prompt."));
      return;
    }
    const random = this.#choices[this.#kind === "first" ? "random_first" : "random_any"];
    this.#root.replaceChildren(this.#chart(shares, random), this.#caption(shares, random), this.#table(repeats));
    this.setLayer(this.#layer);
  }

  #chart(shares, random) {
    const highest = Math.max(random, ...shares.map((share) => share ?? 0));
    const top = Math.min(1, Math.ceil((highest * 1.15) / 0.1) * 0.1);
    const y = (share) => TOP + (1 - share / top) * (HEIGHT - TOP - BOTTOM);
    const slot = (WIDTH - LEFT - RIGHT) / shares.length;
    const width = Math.min(slot * 0.7, 48);
    const middle = (layer) => LEFT + slot * (layer + 0.5);
    const parts = [];
    const gap = top > 0.6 ? 0.2 : 0.1;
    for (let tick = 0; tick <= top + 1e-9; tick += gap) {
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) }),
        svg("text", { class: "tick", x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, percent(tick, 0)));
    }
    const every = Math.ceil(shares.length / 16);
    shares.forEach((share, layer) => {
      const height = y(0) - y(share ?? 0);
      const group = svg("g", { class: "layer", data: { layer }, on: { click: () => this.#onLayer(layer) } },
        svg("title", {}, `Layer ${layer}: ${percent(share)}`),
        svg("rect", { class: "hit", x: LEFT + slot * layer, y: TOP, width: slot, height: HEIGHT - TOP }),
        svg("rect", { class: "column", x: middle(layer) - width / 2, y: y(share ?? 0), width, height, rx: Math.min(2, height / 2) }));
      if (layer % every === 0) {
        group.append(svg("text", { class: "tick", x: middle(layer), y: HEIGHT - 6, "text-anchor": "middle" }, String(layer)));
      }
      parts.push(group);
    });
    parts.push(
      svg("line", { class: "random", x1: LEFT, x2: WIDTH - RIGHT, y1: y(random), y2: y(random) }),
      svg("text", { class: "random-label", x: WIDTH - RIGHT + 5, y: y(random) + 4 }, `random ${percent(random)}`));
    const what = this.#kind === "first" ? "the same first choice" : "an expert in common";
    return svg("svg", {
      class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
      "aria-label": `Share of neighbouring tokens with ${what}, by layer; the table below has the figures.`,
    }, ...parts);
  }

  #caption(shares, random) {
    const known = shares.map((share, layer) => [share, layer]).filter(([share]) => share !== null);
    const [most, layer] = known.reduce((best, each) => (each[0] > best[0] ? each : best));
    const mean = known.reduce((sum, [share]) => sum + share, 0) / known.length;
    const caption = el("p", { class: "note" });
    setText(caption, `Mean ${percent(mean)}, most ${percent(most)} in layer ${layer}; chance alone gives ${percent(random)}. By layer, over prompt and completion.`);
    return caption;
  }

  #table(repeats) {
    const rows = repeats.map(({ layer, first, any }) =>
      el("tr", {}, el("th", { scope: "row" }, String(layer)), el("td", {}, percent(first)), el("td", {}, percent(any))));
    const { random_first: first, random_any: any } = this.#choices;
    rows.push(el("tr", {}, el("th", { scope: "row" }, "random"), el("td", {}, percent(first)), el("td", {}, percent(any))));
    return el("details", {}, el("summary", {}, "As a table"),
      el("table", { class: "plain" },
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Layer"), el("th", { scope: "col" }, "Same first choice"),
          el("th", { scope: "col" }, "Any in common"))),
        el("tbody", {}, ...rows)));
  }
}
