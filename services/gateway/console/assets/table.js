// Tables that become cards on a phone. Roles are explicit: changing `display` would drop them.

import { el, syncChildren } from "./dom.js";

/**
 * A table in `root` with `columns` [{title, class?}] whose rows are kept by key. `update(cells, item)`
 * fills a row; `empty` is said where there are none.
 */
export class LiveTable {
  #root;
  #columns;
  #label;
  #key;
  #create;
  #update;
  #empty;
  #body = null;

  constructor(root, { label, columns, key, create, update, empty }) {
    this.#root = root;
    this.#label = label;
    this.#columns = columns;
    this.#key = key;
    this.#create = create;
    this.#update = update;
    this.#empty = empty;
  }

  show(items) {
    if (!items.length) {
      this.#body = null;
      if (this.#root.firstChild?.textContent !== this.#empty) {
        this.#root.replaceChildren(el("p", { class: "empty" }, this.#empty));
      }
      return;
    }
    if (!this.#body) this.#build();
    syncChildren(this.#body, items, {
      key: this.#key,
      create: (item) => this.#makeRow(item),
      update: (row, item) => this.#update([...row.children], item, row),
    });
  }

  #build() {
    const heads = this.#columns.map((column) =>
      el("th", { scope: "col", role: "columnheader", class: column.class }, column.title));
    this.#body = el("tbody", { role: "rowgroup" });
    this.#root.replaceChildren(
      el("table", { class: "list", role: "table", "aria-label": this.#label },
        el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...heads)), this.#body));
  }

  #makeRow(item) {
    const row = el("tr", { role: "row" });
    this.#columns.forEach((column, index) => {
      const properties = { class: column.class, data: { label: column.title } };
      row.append(index === 0
        ? el("th", { ...properties, scope: "row", role: "rowheader" })
        : el("td", { ...properties, role: "cell" }));
    });
    this.#create?.([...row.children], item);
    return row;
  }
}

/** A bar with its words: `share` 0..1 or null. */
export function meter(share, text) {
  const bar = el("span", { class: "meter", "aria-hidden": "true" });
  const size = share === null || !Number.isFinite(share) ? 0 : Math.max(0, Math.min(1, share));
  bar.style.setProperty("--size", size.toFixed(3));
  bar.classList.toggle("full", size >= 0.9);
  return el("span", { class: "metered" }, el("span", {}, text), bar);
}
