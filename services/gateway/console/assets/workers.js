// The workers: where they run, what they hold, how busy they are, and whether they are there.

import { el, setText } from "./dom.js";
import { bytes, count, milliseconds, percent, plural, ranges, seconds, short } from "./format.js";
import { LiveTable, meter } from "./table.js";
import { stateMark } from "./worker_state.js";

const COLUMNS = [
  { title: "Worker" },
  { title: "State" },
  { title: "Device" },
  { title: "Experts", class: "experts" },
  { title: "Memory", class: "wide" },
  { title: "Queue", class: "number" },
  { title: "Service", class: "number" },
  { title: "Busy", class: "number" },
  { title: "Tokens/s", class: "number" },
  { title: "Frames", class: "number" },
];

// A worker that was restarted at once may never be seen as lost: its loss is shown for so long.
const SHOW_RETURN_S = 8;

/** `admin` gives the drain button, `announce(text)` tells a screen reader of a loss or a return. */
export class Workers {
  #table;
  #states = new Map();
  #announce;
  #note = document.getElementById("workers-note");
  #at = 0;

  constructor({ admin, announce }) {
    this.#announce = announce;
    this.#table = new LiveTable(document.getElementById("workers"), {
      label: "Workers",
      columns: COLUMNS,
      key: (worker) => worker.worker_id,
      create: (cells, worker) => {
        cells[0].append(el("span", { class: "name" }, worker.worker_id), el("span", { class: "detail" }));
        cells[1].append(el("span", {}), admin.drainButton(worker.worker_id));
      },
      update: (cells, worker, row) => update(cells, worker, row, admin, this.#at),
      empty: "No worker: the experts run in the shards' own process, or no worker has registered yet. Start some with: expertfleet up --workers 4",
    });
  }

  /** `at`: Unix seconds now, by the gateway's clock. */
  show(view, at) {
    this.#at = at;
    const order = { lost: 0, draining: 1, loading: 2, ready: 3 };
    const workers = [...view.workers].sort(
      (a, b) => (order[a.state] ?? 2) - (order[b.state] ?? 2) || a.worker_id.localeCompare(b.worker_id, "en", { numeric: true }));
    this.#table.show(workers);
    const num = (state) => workers.filter((worker) => worker.state === state).length;
    const parts = ["ready", "loading", "draining", "lost"].filter(num).map((state) => `${num(state)} ${state}`);
    setText(this.#note, parts.join(", "));
    this.#tell(workers);
  }

  #tell(workers) {
    const changes = [];
    for (const { worker_id: id, state } of workers) {
      const before = this.#states.get(id);
      if (before !== undefined && before !== state) {
        if (state === "lost") changes.push(`Worker ${id} is lost.`);
        else if (before === "lost" && state === "ready") changes.push(`Worker ${id} is back.`);
        else if (state === "draining") changes.push(`Worker ${id} is draining.`);
      }
      this.#states.set(id, state === "loading" && before === "lost" ? "lost" : state);
    }
    if (changes.length) this.#announce(changes.join(" "));
  }
}

function update(cells, worker, row, admin, at) {
  const isLost = worker.state === "lost";
  const lostAgo = worker.lost_at === null ? null : Math.max(0, Math.round(at - worker.lost_at));
  const isBack = !isLost && lostAgo !== null && lostAgo < SHOW_RETURN_S;
  const name = `worker ${worker.state}${isBack ? " returned" : ""}`;
  if (row.className !== name) row.className = name;
  setText(cells[0].lastChild, worker.endpoint ?? "");
  const mark = cells[1].firstChild;
  if (mark.dataset.state !== worker.state) {
    mark.dataset.state = worker.state;
    mark.replaceChildren(stateMark(worker.state), el("span", { class: "detail" }));
  }
  setText(mark.lastChild, lostAgo === null ? "" : `${isLost ? "" : "was lost "}${seconds(lostAgo)} ago`);
  setText(cells[2], [worker.device, worker.host].filter(Boolean).join(" on "));
  setText(cells[3], slotsText(worker.slots));
  cells[3].title = `${plural(worker.slots.length, "slot")} (layer, expert)`;
  const limit = worker.memory_limit_bytes || worker.weight_bytes + worker.memory_free_bytes;
  cells[4].replaceChildren(meter(limit ? worker.weight_bytes / limit : null,
    `${bytes(worker.weight_bytes)} of ${limit ? bytes(limit) : "–"}`));
  setText(cells[5], isLost ? "–" : milliseconds(worker.queue_ms));
  setText(cells[6], isLost ? "–" : milliseconds(worker.compute_ms));
  setText(cells[7], isLost ? "–" : percent(worker.busy, 0));
  setText(cells[8], isLost ? "–" : short(worker.tokens_per_second));
  setText(cells[9], count(worker.num_frames));
  admin.showDrain(cells[1].lastChild, worker);
}

/** "0–3 in all layers" for whole experts, else how many slots of which experts. */
function slotsText(slots) {
  const layersOf = new Map();
  for (const [layer, expert] of slots) {
    if (!layersOf.has(expert)) layersOf.set(expert, []);
    layersOf.get(expert).push(layer);
  }
  const groups = new Map(); // layers' text -> experts
  for (const [expert, layers] of [...layersOf].sort(([a], [b]) => a - b)) {
    const text = ranges(layers.sort((a, b) => a - b));
    groups.set(text, [...(groups.get(text) ?? []), expert]);
  }
  const texts = [...groups].map(([layers, experts]) => `${ranges(experts)} in layers ${layers}`);
  return texts.length > 3 ? `${slots.length} slots of experts ${ranges([...layersOf.keys()].sort((a, b) => a - b))}` : texts.join("; ");
}
