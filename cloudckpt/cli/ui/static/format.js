// Numbers as the command line spells them (cloudckpt/core/text.py), and times as people do.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** `2.1 GiB`; whole numbers below one KiB. */
export function bytes(size) {
  let left = size;
  for (const unit of UNITS) {
    if (Math.abs(left) < 1023.95) return unit === "B" ? `${left} B` : `${left.toFixed(1)} ${unit}`;
    left /= 1024;
  }
  return `${left.toFixed(1)} PiB`;
}

/** `40 s`, `3 min`, `2 h`, `4 d`. */
export function duration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

/** Four decimals; four significant digits for very small or large values. NaN and infinities come as strings. */
export function metric(value) {
  if (value === null || value === undefined) return "-";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  return value === 0 || (size >= 1e-3 && size < 1e6) ? value.toFixed(4) : String(Number(value.toPrecision(4)));
}

/** `1 checkpoint`, `2 checkpoints`. */
export function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/** How long ago, on the clock of this machine; the time itself if it is spelled as only Python can read it. */
export function age(at) {
  const then = Date.parse(at);
  return Number.isNaN(then) ? at : `${duration(Math.max(0, (Date.now() - then) / 1000))} ago`;
}

/** Give a `time` element its time: how long ago, and on which day when asked. */
export function showTime(node, at) {
  const words = age(at);
  if (node.textContent !== words) node.textContent = words;
  if (node.dateTime !== at) {
    node.dateTime = at;
    node.title = Number.isNaN(Date.parse(at)) ? at : new Date(at).toLocaleString();
  }
}

/** A word for a shell, quoted where that is needed. */
export function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}
