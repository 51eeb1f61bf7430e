// How the state of a worker or shard looks: a shape, a word and a colour, never colour alone.

import { el } from "./dom.js";

const SHAPES = { ready: "●", loading: "◔", draining: "◐", lost: "✕" };

export function stateMark(state) {
  const known = state in SHAPES ? state : "loading";
  return el("span", { class: `state ${known}` },
    el("span", { class: "shape", "aria-hidden": "true" }, SHAPES[known]), ` ${state}`);
}
