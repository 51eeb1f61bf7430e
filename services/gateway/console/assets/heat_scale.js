// From tokens per second to one of ten steps of colour, and which experts are hot.

export const NUM_STEPS = 10;
/** An expert with this many times its layer's mean is marked as hot. */
export const HOT_RATIO = 2;

/**
 * What the map shows of one view: per layer and expert the value (tokens/s over `span`, "now" or
 * "window"), its step 0..9 (0 is none), whether it is hot; per layer the imbalance. `max` is the
 * largest value, the top of the scale.
 */
export function heat(view, span) {
  const imbalanceOf = span === "now" ? "imbalance_now" : "imbalance";
  const layers = view.load.layers.map((layer) => {
    const values = layer[span] ?? layer.tokens.map(() => null);
    const known = values.filter((value) => value !== null);
    const mean = known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : 0;
    return { values, mean, imbalance: layer[imbalanceOf] ?? null, replicas: layer.replicas };
  });
  let max = 0;
  for (const layer of layers) for (const value of layer.values) max = Math.max(max, value ?? 0);
  for (const layer of layers) {
    layer.steps = layer.values.map((value) => step(value, max));
    layer.hot = layer.values.map((value) => isHot(value, layer.mean));
  }
  return { layers, max };
}

/** Steps 1..9 divide (0, max] evenly. */
function step(value, max) {
  if (!value || max <= 0) return 0;
  return Math.max(1, Math.min(NUM_STEPS - 1, Math.ceil((value / max) * (NUM_STEPS - 1))));
}

function isHot(value, mean) {
  return value !== null && mean > 0 && value >= HOT_RATIO * mean;
}
