// What a trace says, as plain data: the tree of its spans, and where a sampled step's time went.

const A = "expertfleet.";
/** Spans by name, and what they are called here. */
const NAMES = {
  "expertfleet.gateway.request": "Request",
  "expertfleet.shard.generate": "Generation in the shard",
  "expertfleet.shard.queue": "Queue",
  "expertfleet.session.restore": "Session restore",
  "expertfleet.shard.prefill": "Prefill",
  "expertfleet.shard.decode": "Decode",
  "expertfleet.dispatch": "Dispatch",
  "expertfleet.worker.compute": "Compute",
};
const KINDS = {
  "expertfleet.shard.queue": "queue",
  "expertfleet.session.restore": "wire",
  "expertfleet.shard.prefill": "prefill",
  "expertfleet.shard.decode": "decode",
};

export function nameOf(span) {
  return NAMES[span.name] ?? span.name.replace(/^expertfleet\./, "");
}

/** How its bar is painted. */
export function kindOf(span) {
  return KINDS[span.name] ?? "plain";
}

/** Spans in the order of their tree, as [{span, depth}]. Unknown parents count as none. */
export function tree(spans) {
  const ids = new Set(spans.map((span) => span.span_id));
  const below = new Map();
  for (const span of spans) {
    const parent = span.parent_id !== span.span_id && ids.has(span.parent_id) ? span.parent_id : null;
    if (!below.has(parent)) below.set(parent, []);
    below.get(parent).push(span);
  }
  const rows = [];
  const walk = (parent, depth) => {
    const children = below.get(parent) ?? [];
    below.delete(parent); // a damaged record may have circles
    children.sort((a, b) => a.start_ms - b.start_ms || b.duration_ms - a.duration_ms);
    for (const span of children) {
      rows.push({ span, depth });
      walk(span.span_id, depth + 1);
    }
  };
  walk(null, 0);
  return rows;
}

/**
 * One sampled step: {number, numTokens, numSeqs, numPrefill, start, duration, isLinked, layers, parts}.
 * `parts` divides its duration by what it waited for: per layer the slowest dispatch counts, since
 * all of a layer's dispatches are under way at once.
 */
export function readStep(step) {
  const layers = (step.children ?? []).map(readLayer).sort((a, b) => a.start - b.start);
  const parts = { shard: 0, wire: 0, queue: 0, compute: 0 };
  for (const layer of layers) {
    const slowest = layer.dispatches.reduce(
      (most, each) => (most === null || each.duration > most.duration ? each : most), null);
    if (!slowest) continue;
    for (const part of ["wire", "queue", "compute"]) parts[part] += slowest[part];
  }
  const remote = parts.wire + parts.queue + parts.compute;
  // Micro-batches overlap: then more is waited for than there is time.
  const scale = remote > step.duration_ms ? step.duration_ms / remote : 1;
  for (const part of ["wire", "queue", "compute"]) parts[part] *= scale;
  parts.shard = Math.max(0, step.duration_ms - remote * scale);
  const attribute = (name) => step.attributes[A + name];
  return {
    number: attribute("step") ?? null,
    numTokens: attribute("num_tokens") ?? null,
    numSeqs: attribute("num_seqs") ?? null,
    numPrefill: attribute("num_prefill_tokens") ?? 0,
    start: step.start_ms,
    duration: step.duration_ms,
    isLinked: step.is_linked === true,
    error: step.error ?? null,
    layers,
    parts,
  };
}

function readLayer(span) {
  const dispatches = (span.children ?? []).map(readDispatch).sort((a, b) => a.start - b.start);
  const experts = span.attributes[A + "expert_ids"] ?? [];
  const tokens = span.attributes[A + "tokens_per_expert"] ?? [];
  return {
    layer: span.attributes[A + "layer"] ?? null,
    start: span.start_ms,
    duration: span.duration_ms,
    load: experts.map((expert, index) => [expert, tokens[index] ?? 0]),
    dispatches,
    error: span.error ?? null,
  };
}

/** Clocks of hosts differ, so only durations count: what is neither queue nor compute is the wire. */
function readDispatch(span) {
  const computeSpan = (span.children ?? [])[0] ?? null;
  const compute = span.attributes[A + "compute_ms"] ?? computeSpan?.duration_ms ?? 0;
  const queue = span.attributes[A + "queue_ms"] ?? 0;
  return {
    worker: span.attributes[A + "worker_id"] ?? computeSpan?.instance ?? "?",
    start: span.start_ms,
    duration: span.duration_ms,
    queue: Math.min(queue, span.duration_ms),
    compute: Math.min(compute, Math.max(0, span.duration_ms - queue)),
    wire: Math.max(0, span.duration_ms - queue - compute),
    numTokens: span.attributes[A + "num_tokens"] ?? null,
    experts: span.attributes[A + "expert_ids"] ?? [],
    retries: span.attributes[A + "num_retries"] ?? 0,
    error: span.error ?? null,
  };
}
