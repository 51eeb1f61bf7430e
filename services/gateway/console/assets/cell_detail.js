// Everything known of one expert: the one in focus, or the one pinned, or else the hottest.

import { el, setText, syncChildren } from "./dom.js";
import { count, percent, plural, short, times } from "./format.js";
import { HOT_RATIO } from "./heat_scale.js";
import { stateMark } from "./worker_state.js";

const root = () => document.getElementById("cell");

/** Draw `slot` ({layer, expert} or null) of `view`; `admin` adds its controls. */
export function showCell(view, slot, { isPinned, admin }) {
  const layer = slot && view.load.layers[slot.layer];
  if (!layer || slot.expert >= layer.tokens.length) {
    setText(document.getElementById("cell-title"), "Expert");
    root().replaceChildren(el("p", { class: "empty" }, "Choose a cell of the map to see one expert."));
    return;
  }
  const { layer: at, expert } = slot;
  setText(document.getElementById("cell-title"), `Layer ${at}, expert ${expert}${isPinned ? " (pinned)" : ""}`);
  if (root().dataset.slot !== `${at}:${expert}`) build(at, expert, admin);
  const total = layer.tokens.reduce((sum, tokens) => sum + tokens, 0);
  const figures = {
    now: short(layer.now?.[expert]),
    window: short(layer.window?.[expert]),
    total: count(layer.tokens[expert]),
    share: percent(total ? layer.tokens[expert] / total : null),
    ratio: times(ratioToMean(layer.now ?? layer.window, expert)),
  };
  for (const [name, text] of Object.entries(figures)) {
    setText(root().querySelector(`[data-figure=${name}]`), text);
  }
  const holders = view.workers.filter((worker) => worker.slots.some(([l, e]) => l === at && e === expert));
  const list = root().querySelector(".holders");
  list.hidden = holders.length === 0;
  syncChildren(list, holders, {
    key: (worker) => worker.worker_id,
    create: () => el("li", {}, el("span", {}), el("span", { class: "name" })),
    update: (item, worker) => {
      item.firstChild.replaceChildren(stateMark(worker.state));
      setText(item.lastChild, worker.worker_id);
    },
  });
  setText(root().querySelector("[data-figure=replicas]"), replicasText(view, layer.replicas[expert], holders));
  admin.update(root().querySelector(".cell-admin"), view, slot, holders);
}

function build(layer, expert, admin) {
  root().dataset.slot = `${layer}:${expert}`;
  const row = (label, figure) => el("div", {}, el("dt", {}, label), el("dd", { data: { figure } }, "–"));
  root().replaceChildren(
    el("dl", { class: "figures" },
      row("tokens/s now", "now"), row("tokens/s, window", "window"), row("its layer's mean", "ratio"),
      row("tokens in all", "total"), row("of its layer", "share"), row("replicas", "replicas")),
    el("ul", { class: "holders", "aria-label": "Workers that hold it" }),
    admin.create(),
  );
}

function ratioToMean(values, expert) {
  if (!values) return null;
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return mean > 0 ? values[expert] / mean : null;
}

function replicasText(view, ready, holders) {
  if (!view.workers.length) return "in the shard's process";
  if (ready === 0) return "none ready";
  return `${count(ready)} ready${holders.length > ready ? ` of ${count(holders.length)}` : ""}`;
}

/** The list of the busiest experts; `onSelect(layer, expert)` when one is chosen. */
export function showHottest(view, onSelect) {
  const list = document.getElementById("hottest");
  const hottest = view.load.hottest.filter((entry) => entry.tokens_per_second > 0);
  if (!hottest.length) {
    list.replaceChildren(el("li", { class: "empty" }, "No expert is at work right now."));
    return;
  }
  if (list.querySelector(".empty")) list.replaceChildren();
  const top = hottest[0].tokens_per_second;
  const numExperts = view.model.num_experts;
  syncChildren(list, hottest, {
    key: ({ layer, expert }) => `${layer}:${expert}`,
    create: ({ layer, expert }) =>
      el("li", {}, el("button", { type: "button", class: "hot-row", on: { click: () => onSelect(layer, expert) } },
        el("span", { class: "name" }, el("span", { class: "unseen" }, `Layer ${layer}, expert ${expert}`),
          el("span", { "aria-hidden": "true" }, `L${layer} · E${expert}`)),
        el("span", { class: "detail" }), el("span", { class: "rate" }), el("span", { class: "bar", "aria-hidden": "true" }))),
    update: (item, entry) => {
      const [, detail, rate, bar] = item.firstChild.children;
      setText(rate, `${short(entry.tokens_per_second)}/s`);
      bar.style.setProperty("--size", (entry.tokens_per_second / top).toFixed(3));
      const isHot = entry.share * numExperts >= HOT_RATIO;
      item.classList.toggle("hot", isHot);
      const replicas = view.workers.length ? ` · ×${entry.replicas}` : "";
      setText(detail, `${percent(entry.share, 0)} of layer${replicas}${isHot ? " · hot" : ""}`);
      item.title = view.workers.length ? plural(entry.replicas, "ready replica") : "";
    },
  });
}
