// Every token in the colour of the expert that one layer chose for it.

import { el, setAttribute, setText } from "./dom.js";
import { percent } from "./format.js";
import { colourOf } from "./palette.js";

const RANKS = ["First choice", "Second choice", "Third choice", "Fourth choice"];
const ordinal = (rank) => RANKS[rank] ?? `Choice ${rank + 1}`;

export class Choices {
  #root = document.getElementById("tokens");
  #path = document.getElementById("token-path");
  #palette = document.getElementById("palette");
  #switch = document.getElementById("rank-switch");
  #all = []; // {text, experts: [L][k] or null, element, isPrompt}
  #numLayers = 0;
  #topK = 0;
  #layer = 0;
  #rank = 0;
  #only = null; // the expert whose tokens alone are in colour
  #current = 0;

  constructor() {
    this.#root.addEventListener("keydown", (event) => this.#onKey(event));
    const choose = (event) => {
      const token = event.target.closest(".token");
      if (token) this.#choose(Number(token.dataset.index));
    };
    this.#root.addEventListener("click", choose);
    this.#root.addEventListener("focusin", choose);
  }

  /** Show the answer to `return_expert_choices` of one choice. */
  show(choices) {
    this.#numLayers = choices.num_layers;
    this.#topK = choices.top_k;
    this.#rank = Math.min(this.#rank, this.#topK - 1);
    this.#only = null;
    this.#all = [];
    const group = (label, { tokens, experts }, isPrompt) => {
      const list = el("div", { class: "token-list", role: "listbox", "aria-label": label, "aria-orientation": "horizontal" });
      tokens.forEach((text, index) => {
        const element = this.#makeToken(text, this.#all.length);
        this.#all.push({ text, experts: experts[index] ?? null, element, isPrompt });
        list.append(element);
        if (text.endsWith("\n")) list.append(el("br"));
      });
      return el("div", { class: "token-group" }, el("h3", {}, label), list);
    };
    this.#root.replaceChildren(
      group("Prompt", choices.prompt, true),
      ...(choices.completion.tokens.length ? [group("Completion", choices.completion, false)] : []),
    );
    this.#makeRanks();
    this.#current = 0;
    this.#all[0]?.element.setAttribute("tabindex", "0");
    this.#paint();
    this.#showPath();
  }

  setLayer(layer) {
    this.#layer = layer;
    if (this.#all.length) this.#paint();
    if (this.#all.length) this.#showPath();
  }

  #makeToken(text, index) {
    // What has no ink gets a sign; the text itself stays as it is.
    const shown = text.replaceAll("\n", "↵").replaceAll("\t", "⇥ ");
    return el("span", { class: "token", role: "option", tabindex: "-1", "aria-selected": "false", data: { index } },
      el("span", { class: "text" }, shown), el("span", { class: "number", "aria-hidden": "true" }));
  }

  #makeRanks() {
    const legend = this.#switch.querySelector("legend");
    const options = Array.from({ length: this.#topK }, (_, rank) =>
      el("label", {}, el("input", {
        type: "radio", name: "rank", value: rank, checked: rank === this.#rank,
        on: { change: () => { this.#rank = rank; this.#paint(); } },
      }), el("span", {}, ordinal(rank))));
    this.#switch.replaceChildren(legend, ...options);
  }

  #paint() {
    const counts = new Map();
    for (const token of this.#all) {
      const chosen = token.experts?.[this.#layer] ?? null;
      const expert = chosen ? chosen[this.#rank] : null;
      if (expert !== null) counts.set(expert, (counts.get(expert) ?? 0) + 1);
      const isDim = this.#only !== null && expert !== this.#only;
      const other = chosen && this.#topK > 1 ? chosen[this.#rank === 0 ? 1 : 0] : null;
      const classes = ["token"];
      if (expert === null) classes.push("unrouted");
      else classes.push(isDim ? "dim" : colourOf(expert));
      if (other !== null && !isDim) classes.push(`also-${colourOf(other)}`);
      token.element.className = classes.join(" ");
      setText(token.element.lastChild, expert === null ? "" : String(expert));
      const words = this.#words(token, chosen);
      setAttribute(token.element, "title", words);
      setAttribute(token.element, "aria-label", words);
    }
    this.#paintPalette(counts);
  }

  #words({ text }, chosen) {
    const name = JSON.stringify(text);
    if (!chosen) return `${name}: never run through the model, so no expert was chosen`;
    const [first, ...rest] = chosen;
    const then = rest.length ? `, then ${rest.join(", ")}` : "";
    return `${name}, layer ${this.#layer}: expert ${first}${then}`;
  }

  /** The experts that occur, in order, with their share of the tokens. */
  #paintPalette(counts) {
    const total = [...counts.values()].reduce((sum, value) => sum + value, 0);
    const items = [...counts].sort(([a], [b]) => a - b).map(([expert, number]) =>
      el("li", {}, el("button", {
        type: "button", "aria-pressed": String(this.#only === expert), data: { expert },
        title: `Show only tokens of expert ${expert}`,
        on: { click: () => this.#filter(expert) },
      }, el("span", { class: `swatch ${colourOf(expert)}` }, String(expert)),
      el("span", { class: "unseen" }, `Expert ${expert}: `), percent(number / total, 0))));
    const focused = document.activeElement?.closest?.("#palette button")?.dataset.expert;
    this.#palette.replaceChildren(...items);
    if (focused !== undefined) this.#palette.querySelector(`[data-expert="${focused}"]`)?.focus();
  }

  #filter(expert) {
    this.#only = this.#only === expert ? null : expert;
    this.#paint();
  }

  #onKey(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -Infinity, End: Infinity };
    const move = moves[event.key];
    if (move === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(this.#all.length - 1, this.#current + move));
    this.#all[next].element.focus();
  }

  #choose(index) {
    const before = this.#all[this.#current]?.element;
    before?.setAttribute("tabindex", "-1");
    before?.setAttribute("aria-selected", "false");
    this.#current = index;
    const { element } = this.#all[index];
    element.setAttribute("tabindex", "0");
    element.setAttribute("aria-selected", "true");
    this.#showPath();
  }

  /** The chosen token's way through all layers. */
  #showPath() {
    const token = this.#all[this.#current];
    if (!token) return this.#path.replaceChildren();
    if (!token.experts) {
      return this.#path.replaceChildren(el("p", { class: "note" },
        `${JSON.stringify(token.text)} is the last token: it was never run through the model.`));
    }
    const steps = token.experts.map((chosen, layer) =>
      el("li", { class: layer === this.#layer ? "here" : null, "aria-label": `Layer ${layer}: experts ${chosen.join(", ")}` },
        el("span", { class: "at", "aria-hidden": "true" }, `L${layer}`),
        ...chosen.map((expert) => el("span", { class: `swatch ${colourOf(expert)}`, "aria-hidden": "true" }, String(expert)))));
    return this.#path.replaceChildren(
      el("p", { class: "note" }, "Way of ", el("code", {}, JSON.stringify(token.text)), " through the layers"),
      el("ol", {}, ...steps));
  }
}
