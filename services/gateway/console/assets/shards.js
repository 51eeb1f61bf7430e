// The attention shards: batch, KV cache, time to first token and per token.

import { el, setText } from "./dom.js";
import { count, percent, percentiles, short } from "./format.js";
import { LiveTable, meter } from "./table.js";
import { stateMark } from "./worker_state.js";

const COLUMNS = [
  { title: "Shard" },
  { title: "State" },
  { title: "Batch", class: "wide" },
  { title: "Saturation", class: "wide" },
  { title: "KV blocks", class: "wide" },
  { title: "Waiting", class: "number" },
  { title: "Tokens/s", class: "number" },
  { title: "TTFT", class: "number" },
  { title: "TPOT", class: "number" },
];

export class Shards {
  #table = new LiveTable(document.getElementById("shards"), {
    label: "Attention shards",
    columns: COLUMNS,
    key: (shard) => shard.shard_id,
    create: (cells, shard) => {
      cells[0].append(el("span", { class: "name" }, shard.shard_id), el("span", { class: "detail" }));
    },
    update,
    empty: "No shard has registered. Requests wait until one is ready; see the log of: expertfleet status",
  });

  show(view) {
    this.#table.show(view.shards);
  }
}

function update(cells, shard, row) {
  row.className = `shard ${shard.state}`;
  setText(cells[0].lastChild, [shard.host, shard.pid && `pid ${shard.pid}`].filter(Boolean).join(", "));
  if (cells[1].dataset.state !== shard.state) {
    cells[1].dataset.state = shard.state;
    cells[1].replaceChildren(stateMark(shard.state));
  }
  const most = shard.max_num_seqs;
  cells[2].replaceChildren(most
    ? meter(shard.num_running / most, `${count(shard.num_running)} of ${count(most)}`)
    : count(shard.num_running));
  cells[3].replaceChildren(meter(shard.saturation, percent(shard.saturation, 0)));
  const total = shard.kv_blocks_total;
  cells[4].replaceChildren(meter(total ? shard.kv_blocks_used / total : null,
    `${percent(total ? shard.kv_blocks_used / total : null, 0)} of ${short(total)}`));
  setText(cells[5], shard.num_waiting ? `${count(shard.num_waiting)} (${short(shard.waiting_tokens)} tok)` : "0");
  setText(cells[6], short(shard.tokens_per_second));
  showPercentiles(cells[7], shard.ttft_ms);
  showPercentiles(cells[8], shard.tpot_ms);
}

/** The median, and p95 below it. */
function showPercentiles(cell, value) {
  const known = percentiles(value);
  if (!cell.firstElementChild) cell.append(el("span", {}), el("span", { class: "detail" }));
  setText(cell.firstElementChild, known ? known.usual : "–");
  setText(cell.lastElementChild, known ? `p95 ${known.high}` : "");
}
