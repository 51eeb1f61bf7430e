// The map of layers x experts: a grid that a mouse, a keyboard and a screen reader can walk.

import { el, setAttribute, setText } from "./dom.js";
import { short, times } from "./format.js";
import { NUM_STEPS, heat } from "./heat_scale.js";

// Pixels. Below the first a cell has no room for its number, below the second it is not drawn
// narrower: the map scrolls within its panel.
const WIDTH_FOR_TEXT = 30;
const LEAST_WIDTH = 6;
// Deeper models than this lie on their side where there is room: layers from left to right.
const MOST_ROWS = 16;
const WIDTH_TO_TURN = 700;
// A shallow model's rows are higher, to fill about this height.
const HEIGHT = 400;
const ROW_HEIGHT = { least: 18, most: 92, mostNarrow: 34 };

/** `onSelect(layer, expert, isPinned)` is called for the cell in focus or clicked. */
export class HeatMap {
  #table = document.getElementById("map");
  #scroll = document.getElementById("map-scroll");
  #empty = document.getElementById("map-empty");
  #onSelect;
  #view = null;
  #span = "now";
  #shape = "";
  #cells = []; // [layer][expert]
  #imbalances = []; // [layer]
  #isTurned = false; // layers are columns
  #current = null; // the one cell that Tab reaches

  constructor({ onSelect }) {
    this.#onSelect = onSelect;
    const bar = document.getElementById("scale-bar");
    for (let step = 0; step < NUM_STEPS; step += 1) bar.append(el("i", { class: `h${step}` }));
    this.#table.addEventListener("keydown", (event) => this.#onKey(event));
    this.#table.addEventListener("focusin", (event) => this.#onFocus(event));
    this.#table.addEventListener("click", (event) => this.#onClick(event));
    new ResizeObserver(() => this.#layOut()).observe(this.#scroll);
    for (const radio of document.querySelectorAll("input[name=span]")) {
      radio.addEventListener("change", () => {
        this.#span = radio.value;
        if (this.#view) this.#paint();
      });
    }
  }

  /** "now" or "window". */
  get span() {
    return this.#span;
  }

  show(view) {
    this.#view = view;
    const isEmpty = view.load.layers.length === 0;
    this.#scroll.hidden = isEmpty;
    this.#empty.hidden = !isEmpty;
    if (isEmpty) {
      setText(this.#empty, "This model has no experts: nothing to map. Requests are served all the same.");
      return;
    }
    this.#layOut();
    this.#paint();
  }

  /** Mark the pinned cell, or none for null. */
  pin(slot) {
    for (const cell of this.#table.querySelectorAll("[aria-selected=true]")) {
      cell.setAttribute("aria-selected", "false");
    }
    if (slot) this.#cells[slot.layer]?.[slot.expert]?.setAttribute("aria-selected", "true");
  }

  #layOut() {
    if (!this.#view || !this.#view.load.layers.length) return;
    const numLayers = this.#view.load.layers.length;
    const numExperts = this.#view.load.layers[0].tokens.length;
    const width = this.#scroll.clientWidth;
    if (!width) return; // another view is shown
    const isTurned = numLayers > MOST_ROWS && numLayers >= numExperts && width >= WIDTH_TO_TURN;
    const shape = `${numLayers}x${numExperts}x${isTurned}`;
    if (shape !== this.#shape) {
      this.#shape = shape;
      this.#isTurned = isTurned;
      this.#build(numLayers, numExperts);
      this.#paint();
    }
    const columns = isTurned ? numLayers : numExperts;
    const rows = isTurned ? numExperts : numLayers;
    const each = (width - 90) / columns;
    const isDense = each < WIDTH_FOR_TEXT;
    this.#table.classList.toggle("dense", isDense);
    this.#table.classList.toggle("turned", isTurned);
    this.#table.classList.toggle("many-rows", rows > MOST_ROWS);
    const most = width < WIDTH_TO_TURN ? ROW_HEIGHT.mostNarrow : ROW_HEIGHT.most;
    const height = Math.max(ROW_HEIGHT.least, Math.min(most, Math.round(HEIGHT / rows)));
    this.#table.style.setProperty("--row", `${height}px`);
    this.#table.style.minWidth = `${Math.ceil(columns * LEAST_WIDTH + 90)}px`;
  }

  #build(numLayers, numExperts) {
    const hadFocus = this.#table.contains(document.activeElement);
    this.#cells = Array.from({ length: numLayers }, () => []);
    this.#imbalances = [];
    const columns = this.#isTurned ? numLayers : numExperts;
    const rows = this.#isTurned ? numExperts : numLayers;
    const across = this.#isTurned ? "Layer" : "Expert";
    const down = this.#isTurned ? "Expert" : "Layer";
    const every = columns > 64 ? 8 : columns > 24 ? 4 : 1;

    const heads = Array.from({ length: columns }, (_, column) =>
      el("th", { scope: "col", role: "columnheader", class: column % every ? "between" : null,
        "aria-label": `${across} ${column}` }, `${across[0]}${column}`),
    );
    const corner = el("th", { scope: "col", role: "columnheader", class: "corner" },
      this.#isTurned ? "Expert \\ layer" : "Layer \\ expert");
    const head = el("tr", { role: "row" }, corner, ...heads);
    if (!this.#isTurned) head.append(el("th", { scope: "col", role: "columnheader", class: "uneven-head" }, "max/mean"));

    const body = el("tbody", { role: "rowgroup" });
    for (let row = 0; row < rows; row += 1) {
      const line = el("tr", { role: "row" }, el("th", {
        scope: "row", role: "rowheader", "aria-label": `${down} ${row}`,
      }, `${down[0]}${row}`));
      for (let column = 0; column < columns; column += 1) {
        const [layer, expert] = this.#isTurned ? [column, row] : [row, column];
        line.append((this.#cells[layer][expert] = this.#makeCell(layer, expert)));
      }
      if (!this.#isTurned) line.append((this.#imbalances[row] = this.#makeImbalance()));
      body.append(line);
    }
    if (this.#isTurned) {
      const line = el("tr", { role: "row", class: "uneven-row" },
        el("th", { scope: "row", role: "rowheader" }, "max/mean"));
      for (let layer = 0; layer < numLayers; layer += 1) {
        line.append((this.#imbalances[layer] = this.#makeImbalance()));
      }
      body.append(line);
    }
    this.#table.replaceChildren(el("thead", { role: "rowgroup" }, head), body);
    const { layer = 0, expert = 0 } = this.#current ?? {};
    this.#makeCurrent(Math.min(layer, numLayers - 1), Math.min(expert, numExperts - 1));
    if (hadFocus) this.#cells[this.#current.layer][this.#current.expert].focus();
  }

  #makeCell(layer, expert) {
    return el("td", {
      role: "gridcell", tabindex: "-1", class: "cell h0", "aria-selected": "false",
      data: { layer, expert },
    }, el("span", { class: "value" }, "–"), el("span", { class: "mark" }));
  }

  #makeImbalance() {
    return el("td", { role: "gridcell", class: "uneven" },
      el("span", { class: "bar", "aria-hidden": "true" }), el("span", { class: "value" }));
  }

  #paint() {
    if (!this.#cells.length) return; // not laid out yet: another view is shown
    const { layers, max } = heat(this.#view, this.#span);
    const hasWorkers = this.#view.workers.length > 0;
    layers.forEach((layer, index) => {
      layer.values.forEach((value, expert) => {
        this.#paintCell(this.#cells[index][expert], {
          value, step: layer.steps[expert], isHot: layer.hot[expert],
          replicas: hasWorkers ? layer.replicas[expert] : 1,
        });
      });
      this.#paintImbalance(this.#imbalances[index], layer.imbalance);
    });
    setText(document.getElementById("scale-max"), max ? short(max) : "–");
    setText(document.getElementById("map-note"), this.#note(layers, max));
  }

  #paintCell(cell, { value, step, isHot, replicas }) {
    const isAbsent = replicas === 0;
    const name = `cell h${step}${isHot ? " hot" : ""}${isAbsent ? " absent" : ""}`;
    if (cell.className !== name) cell.className = name;
    setText(cell.firstChild, short(value));
    const marks = [];
    if (isAbsent) marks.push("no replica");
    else if (replicas > 1) marks.push(`×${replicas}`);
    const mark = cell.lastChild;
    setText(mark, marks.join(" "));
    setAttribute(cell, "title", this.#title(cell, { value, isHot, replicas }));
  }

  #title(cell, { value, isHot, replicas }) {
    const where = `Layer ${cell.dataset.layer}, expert ${cell.dataset.expert}`;
    const what = `${short(value)} tokens/s${isHot ? ", hot" : ""}`;
    const held = this.#view.workers.length ? `, ${replicas || "no"} ready replica${replicas === 1 ? "" : "s"}` : "";
    return `${where}: ${what}${held}`;
  }

  #paintImbalance(cell, imbalance) {
    const [bar, value] = cell.children;
    // 1 is even and draws nothing; 4 times the mean fills the bar.
    const size = imbalance === null ? 0 : Math.max(0, Math.min(1, (imbalance - 1) / 3));
    bar.style.setProperty("--size", size.toFixed(3));
    setText(value, times(imbalance));
    setAttribute(cell, "title", `Busiest expert over mean: ${times(imbalance)}`);
    cell.classList.toggle("high", imbalance !== null && imbalance >= 2);
  }

  #note(layers, max) {
    if (!max) {
      return this.#view.load.now_s === null && this.#view.load.window_s === null
        ? "Waiting for the first two readings." : "No tokens right now. Run a prompt under Routing.";
    }
    let worst = 0;
    layers.forEach((layer, index) => {
      if ((layer.imbalance ?? 0) > (layers[worst].imbalance ?? 0)) worst = index;
    });
    return `Most uneven: layer ${worst}, ${times(layers[worst].imbalance)} its mean. Ringed: twice the mean or more.`;
  }

  #onKey(event) {
    const at = this.#slotOf(event.target);
    if (!at || event.altKey || event.metaKey) return;
    const [down, right] = this.#isTurned ? ["expert", "layer"] : ["layer", "expert"];
    const next = { ...at };
    const last = { layer: this.#cells.length - 1, expert: this.#cells[0].length - 1 };
    switch (event.key) {
      case "ArrowUp": next[down] -= 1; break;
      case "ArrowDown": next[down] += 1; break;
      case "ArrowLeft": next[right] -= 1; break;
      case "ArrowRight": next[right] += 1; break;
      case "Home": next[right] = 0; if (event.ctrlKey) next[down] = 0; break;
      case "End": next[right] = last[right]; if (event.ctrlKey) next[down] = last[down]; break;
      case "Enter":
      case " ": this.#onSelect(at.layer, at.expert, true); event.preventDefault(); return;
      default: return;
    }
    event.preventDefault();
    const cell = this.#cells[next.layer]?.[next.expert];
    if (cell) cell.focus();
  }

  #onFocus(event) {
    const at = this.#slotOf(event.target);
    if (!at) return;
    this.#makeCurrent(at.layer, at.expert);
    this.#onSelect(at.layer, at.expert, false);
  }

  #onClick(event) {
    const at = this.#slotOf(event.target);
    if (at) this.#onSelect(at.layer, at.expert, true);
  }

  #slotOf(target) {
    const cell = target.closest("td.cell");
    return cell && { layer: Number(cell.dataset.layer), expert: Number(cell.dataset.expert) };
  }

  #makeCurrent(layer, expert) {
    if (this.#current) this.#cells[this.#current.layer]?.[this.#current.expert]?.setAttribute("tabindex", "-1");
    this.#current = { layer, expert };
    this.#cells[layer][expert].setAttribute("tabindex", "0");
  }
}
