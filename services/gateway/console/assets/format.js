// Numbers as people read them. Every function answers "–" for null.

const NONE = "–";
const isNone = (value) => value === null || value === undefined || !Number.isFinite(value);

/** A rate or count in at most four characters of digits: 0, 0.4, 12, 980, 1.2k, 35k, 1.4M. */
export function short(value) {
  if (isNone(value)) return NONE;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 0.05) return "<0.1";
  if (size < 9.95) return value.toFixed(1).replace(/\.0$/, "");
  if (size < 999.5) return value.toFixed(0);
  for (const [unit, scale] of [["k", 1e3], ["M", 1e6], ["G", 1e9], ["T", 1e12]]) {
    const scaled = value / scale;
    if (Math.abs(scaled) < 9.95) return scaled.toFixed(1).replace(/\.0$/, "") + unit;
    if (Math.abs(scaled) < 999.5) return scaled.toFixed(0) + unit;
  }
  return value.toExponential(1);
}

/** A whole number with thousands apart. */
export function count(value) {
  return isNone(value) ? NONE : Math.round(value).toLocaleString("en-US");
}

/** Bytes with binary units, as memory is sold and reported: 640 MiB, 1.5 GiB. */
export function bytes(value) {
  if (isNone(value)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let scaled = value;
  let unit = 0;
  while (Math.abs(scaled) >= 1000 && unit < units.length - 1) {
    scaled /= 1024;
    unit += 1;
  }
  const digits = unit > 0 && Math.abs(scaled) < 9.95 ? 1 : 0;
  return `${scaled.toFixed(digits)} ${units[unit]}`;
}

/** Milliseconds: 0.42 ms, 8.1 ms, 120 ms, 2.4 s. */
export function milliseconds(value) {
  if (isNone(value)) return NONE;
  if (value >= 1000) return seconds(value / 1000);
  if (value >= 99.5) return `${value.toFixed(0)} ms`;
  if (value >= 0.995) return `${value.toFixed(1)} ms`;
  return value === 0 ? "0 ms" : `${value.toFixed(2)} ms`;
}

/** Seconds: 0.42 s, 2.4 s, 75 s, 12 min, 3 h, 2 d. */
export function seconds(value) {
  if (isNone(value)) return NONE;
  if (value < 0.9995) return value === 0 ? "0 s" : `${value.toFixed(2)} s`;
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 119.5) return `${value.toFixed(0)} s`;
  if (value < 7170) return `${(value / 60).toFixed(0)} min`;
  if (value < 172000) return `${(value / 3600).toFixed(0)} h`;
  return `${(value / 86400).toFixed(0)} d`;
}

/** A share of one in per cent: 0.3 %, 12.5 %, 100 %. */
export function percent(value, digits = 1) {
  if (isNone(value)) return NONE;
  return `${(value * 100).toFixed(digits).replace(/\.0+$/, "")} %`;
}

/** "2.4×". */
export function times(value) {
  return isNone(value) ? NONE : `${value.toFixed(value < 9.95 ? 2 : 0)}×`;
}

/** Two percentiles, the usual one first: "31 ms, p95 80 ms". */
export function percentiles(value) {
  return value ? { usual: milliseconds(value.p50), high: milliseconds(value.p95) } : null;
}

/** How long before `at` (Unix seconds) something happened: "12 s ago". */
export function ago(happened, at) {
  return isNone(happened) || isNone(at) ? NONE : `${seconds(Math.max(0, Math.round(at - happened)))} ago`;
}

/** One and many: plural(1, "worker") is "1 worker". */
export function plural(value, noun) {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}

/** Sorted whole numbers as ranges: [0,1,2,5] is "0–2, 5". */
export function ranges(numbers) {
  const parts = [];
  for (let start = 0; start < numbers.length; ) {
    let end = start;
    while (end + 1 < numbers.length && numbers[end + 1] === numbers[end] + 1) end += 1;
    if (end - start >= 2) parts.push(`${numbers[start]}–${numbers[end]}`);
    else for (let at = start; at <= end; at += 1) parts.push(String(numbers[at]));
    start = end + 1;
  }
  return parts.join(", ");
}
