// Puts the page together: the feed into its panels, the address into its views.

import { Admin } from "./admin.js";
import { showCell, showHottest } from "./cell_detail.js";
import { setText } from "./dom.js";
import { Feed } from "./feed.js";
import { seconds } from "./format.js";
import { HeatMap } from "./heatmap.js";
import { Routing } from "./routing.js";
import { Shards } from "./shards.js";
import { SlowRequests } from "./slow_requests.js";
import { Summary } from "./summary.js";
import { Trace } from "./trace.js";
import { Workers } from "./workers.js";

const announce = (text) => setText(document.getElementById("announcer"), text);
const admin = new Admin();
const summary = new Summary();
const workers = new Workers({ admin, announce });
const shards = new Shards();
const slowRequests = new SlowRequests();
const routing = new Routing();
const trace = new Trace();
const heatMap = new HeatMap({ onSelect: select });

let view = null;
let pinned = null; // {layer, expert}
let focused = null;
let shownAt = 0;

function show(next) {
  view = next;
  const { name, num_layers: layers, num_experts: experts, num_experts_per_tok: topK } = view.model;
  const shape = view.load.layers.length ? ` · ${layers} layers × ${experts} experts, top ${topK}` : "";
  setText(document.getElementById("model"), `${name}${shape}`);
  document.title = `${name} · expertfleet`;
  showSpans(view.load);
  admin.setOn(view.admin);
  routing.setModel(name);
  summary.show(view);
  heatMap.show(view);
  shownAt = performance.now();
  showTimes();
  shards.show(view);
  showHottest(view, (layer, expert) => select(layer, expert, true));
  showChosen();
  showStore(view.store);
}

/** What tells how long ago something was goes on between views: they come only when there is news. */
function showTimes() {
  const at = view.at + (performance.now() - shownAt) / 1000;
  workers.show(view, at);
  slowRequests.show(view, at);
}

function showSpans({ now_s: nowS, window_s: windowS }) {
  const text = (name, length) => (length === null ? name : `${name}, ${seconds(Math.round(length))}`);
  setText(document.getElementById("span-now"), text("Now", nowS));
  setText(document.getElementById("span-window"), text("Window", windowS));
}

/** A cell got the focus, or was pinned by click or Enter; pinning it again lets it go. */
function select(layer, expert, isPinned) {
  if (isPinned) {
    const isSame = pinned?.layer === layer && pinned?.expert === expert;
    pinned = isSame ? null : { layer, expert };
    heatMap.pin(pinned);
  }
  focused = { layer, expert };
  if (view) showChosen();
}

function showChosen() {
  const hottest = view.load.hottest[0];
  const slot = pinned ?? focused ?? (hottest ? { layer: hottest.layer, expert: hottest.expert } : null);
  showCell(view, slot, { isPinned: pinned !== null, admin });
}

let connection = { kind: "connecting" };
let countdown = 0;

function showConnection(state) {
  clearInterval(countdown);
  const isNews = state.kind !== connection.kind || state.message !== connection.message;
  connection = state;
  document.body.dataset.connection = state.kind;
  document.getElementById("connection").dataset.state = state.kind;
  document.getElementById("connection").title = state.message ?? "";
  const button = document.getElementById("reconnect");
  button.hidden = state.kind === "live" || state.kind === "connecting";
  setText(button, state.kind === "denied" ? "Enter key" : "Retry now");
  const texts = { connecting: "Connecting", live: "Live", lost: "Connection lost", denied: "API key needed" };
  if (isNews || state.kind === "live") showConnectionText(texts[state.kind]);
  if (state.kind !== "lost") return;
  // The count is for the eye only: a status that changes every second would be read out.
  const until = Date.now() + state.retryInS * 1000;
  const tick = () => {
    const left = Math.max(0, Math.ceil((until - Date.now()) / 1000));
    document.getElementById("connection").dataset.left = left ? `, again in ${left} s` : ", trying";
  };
  tick();
  countdown = setInterval(tick, 500);
}

function showConnectionText(text) {
  setText(document.getElementById("connection-text"), text);
  if (connection.kind !== "lost") delete document.getElementById("connection").dataset.left;
}

/** The gateway answers, but what it knows of the fleet is old: it cannot read the leases. */
function showStore(store) {
  if (store !== "away") return;
  showConnectionText("Live, but the store is away");
  document.getElementById("connection").dataset.state = "stale";
  document.getElementById("connection").title = "The gateway cannot reach its lease store: workers and shards are shown as last seen.";
}

const PANELS = [...document.querySelectorAll("[data-panel]")];

function showAddress() {
  const hash = location.hash.slice(1);
  if (hash === "main") return; // the skip link
  const isTrace = hash.startsWith("trace");
  const name = isTrace ? "traces" : hash === "routing" ? "routing" : "load";
  for (const panel of PANELS) panel.hidden = panel.dataset.panel !== name;
  for (const link of document.querySelectorAll("nav [data-view]")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (isTrace) showTrace(hash);
  else if (view && name === "load") heatMap.show(view);
}

function showTrace(hash) {
  const id = hash.startsWith("trace=") ? decoded(hash.slice("trace=".length)) : "";
  if (id) trace.open(id);
  else trace.showList();
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

const feed = new Feed({ onView: show, onState: showConnection });
document.getElementById("reconnect").addEventListener("click", () => feed.retry());
addEventListener("hashchange", showAddress);
showAddress();
setInterval(() => {
  if (view && connection.kind === "live") showTimes();
}, 1000);
feed.run();
