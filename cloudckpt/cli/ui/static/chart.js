// The metric over the steps, drawn by hand: a point for each checkpoint, whose shape and colour say what became of it.

import { by, element, svg, text } from "./dom.js";
import { metric as spelled } from "./format.js";

// As `cloudckpt plot` draws them; later ones lie on top.
const KINDS = ["deleted", "failed", "uploading", "saved", "pinned", "best"];
const MARGIN = { top: 12, right: 16, bottom: 34, left: 64 };
const SIZE = 5;
const TICKS_AT_MOST = 12;

const SHAPES = {
  saved: (x, y) => svg("circle", { cx: x, cy: y, r: SIZE }),
  pinned: (x, y) => svg("rect", { x: x - SIZE, y: y - SIZE, width: 2 * SIZE, height: 2 * SIZE }),
  uploading: (x, y) => svg("path", { d: `M${x - SIZE} ${y + SIZE}h${2 * SIZE}l${-SIZE} ${-2 * SIZE}z` }),
  failed: (x, y) => svg("path", { d: `M${x - SIZE} ${y - SIZE}h${2 * SIZE}l${-SIZE} ${2 * SIZE}z` }),
  deleted: (x, y) => svg("path", { d: `M${x - SIZE} ${y - SIZE}l${2 * SIZE} ${2 * SIZE}m0 ${-2 * SIZE}l${-2 * SIZE} ${2 * SIZE}` }),
  best: (x, y) => svg("path", { d: star(x, y, 1.7 * SIZE, 0.7 * SIZE) }),
};

function star(x, y, outer, inner) {
  const corners = Array.from({ length: 10 }, (_, n) => {
    const angle = (n * Math.PI) / 5 - Math.PI / 2;
    const far = n % 2 ? inner : outer;
    return `${(x + far * Math.cos(angle)).toFixed(2)} ${(y + far * Math.sin(angle)).toFixed(2)}`;
  });
  return `M${corners.join("L")}z`;
}

function mark(kind, x, y) {
  const shape = (SHAPES[kind] ?? SHAPES.saved)(x, y);
  shape.setAttribute("class", `mark ${kind}`);
  return shape;
}

/** Round numbers between two bounds, about as many as asked for. */
export function ticks(low, high, about, least = 0) {
  const raw = Math.max((high - low) / Math.max(about, 1), least, Number.MIN_VALUE);
  const power = 10 ** Math.floor(Math.log10(raw));
  const unit = ([1, 2, 5].find((n) => n * power >= raw * (1 - 1e-9)) ?? 10) * power;
  const first = Math.ceil(low / unit);
  const found = [];
  for (let n = 0; n <= TICKS_AT_MOST; n += 1) {
    const value = (first + n) * unit;
    if (!(value <= high + unit * 1e-9)) break;
    found.push(value);
  }
  return found;
}

function bounds(values) {
  const [low, high] = extremes(values);
  if (high > low) return [low, high];
  const room = Math.abs(low) * 0.1 || 1;
  return [Math.max(low - room, -Number.MAX_VALUE), Math.min(high + room, Number.MAX_VALUE)];
}

/** Where a value lies between two bounds, from 0 to 1; of the largest numbers even the distance is infinite. */
function share(value, low, high) {
  const unit = Number.isFinite(high - low) ? 1 : 0.5;
  return (value * unit - low * unit) / (high * unit - low * unit);
}

// Not Math.min(...values): ten thousand arguments are more than some engines take.
function extremes(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

/** One picture in the page. `onpick` is told the name of the checkpoint that is looked at, or null. */
export class Chart {
  constructor(onpick) {
    this.area = by("chart-area");
    this.onpick = onpick;
    this.plot = null;
    this.places = [];
    this.ring = null;
    this.picked = null;
    new ResizeObserver(() => this.draw()).observe(this.area);
    this.area.addEventListener("keydown", (event) => this.key(event));
    this.area.addEventListener("pointermove", (event) => this.point(event));
    this.area.addEventListener("pointerdown", (event) => this.point(event));
    const legend = KINDS.map((kind) =>
      element("li", {}, svg("svg", { viewBox: "-9 -9 18 18", "aria-hidden": "true" }, mark(kind, 0, 0)), kind),
    );
    by("legend").replaceChildren(...legend);
  }

  /** Show a document of `plot`, or with null nothing; the same one again changes nothing. */
  show(plot) {
    const drawn = JSON.stringify(plot);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    this.plot = plot;
    if (!plot?.points.some((point) => point.name === this.picked)) this.pick(null);
    this.draw();
    this.tell();
  }

  draw() {
    if (!this.plot) {
      Object.assign(this, { places: [], ring: null });
      this.area.replaceChildren();
      return;
    }
    const width = this.area.clientWidth;
    const height = this.area.clientHeight;
    if (width < 50 || height < 50) return;
    const points = this.plot.points;
    const drawn = points.filter((point) => point.value !== null);
    const [left, right] = bounds(points.map((point) => point.step));
    const [low, high] = bounds(drawn.map((point) => point.value));
    const inside = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    const x = (step) => inside.left + share(step, left, right) * (inside.right - inside.left);
    const y = (value) => inside.bottom - share(value, low, high) * (inside.bottom - inside.top - 2 * SIZE) - SIZE;
    // Gone with its metric, or not measured yet: only the step is known, so the mark is on the axis.
    this.places = points.map((point) => ({ point, x: x(point.step), y: point.value === null ? inside.bottom : y(point.value) }));
    const line = this.places.filter(({ point }) => point.value !== null && point.kind !== "failed");
    this.ring = svg("circle", { class: "ring", r: 2.2 * SIZE, visibility: "hidden" });
    const picture = svg(
      "svg",
      { role: "img", "aria-label": this.summary(drawn), viewBox: `0 0 ${width} ${height}`, width, height },
      ...ticks(low, high, 4).flatMap((value) => [
        svg("line", { class: "grid", x1: inside.left, x2: inside.right, y1: y(value), y2: y(value) }),
        svg("text", { class: "tick", x: inside.left - 8, y: y(value) + 4, "text-anchor": "end" }, short(value)),
      ]),
      svg("line", { class: "axis", x1: inside.left, x2: inside.right, y1: inside.bottom, y2: inside.bottom }),
      ...ticks(left, right, Math.max(2, Math.floor(width / 120)), 1)
        .filter((step) => Number.isInteger(step) && step >= 0)
        .map((step) => svg("text", { class: "tick", x: x(step), y: height - 14, "text-anchor": "middle" }, short(step))),
      svg("text", { class: "tick", x: inside.right, y: height - 1, "text-anchor": "end" }, "step"),
      svg("polyline", { class: "curve", points: line.map((place) => `${place.x.toFixed(1)},${place.y.toFixed(1)}`).join(" ") }),
      ...KINDS.flatMap((kind) =>
        this.places.filter(({ point }) => point.kind === kind).map((place) => mark(kind, place.x, place.y)),
      ),
      this.ring,
    );
    this.area.replaceChildren(picture);
    this.encircle();
  }

  summary(drawn) {
    const by_value = (one, other) => one.value - other.value;
    const sorted = [...drawn].sort(by_value);
    const ends = sorted.length ? `, from ${spelled(sorted[0].value)} to ${spelled(sorted.at(-1).value)}` : "";
    return `${this.plot.metric} of ${this.plot.points.length} checkpoints${ends}. The table below has the same numbers.`;
  }

  key(event) {
    // With another key they are the browser's own: back, or the end of the page.
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const last = this.places.length - 1;
    const now = this.places.findIndex(({ point }) => point.name === this.picked);
    const next = {
      ArrowLeft: now < 0 ? last : Math.max(0, now - 1),
      ArrowRight: Math.min(last, now + 1),
      Home: 0,
      End: last,
    }[event.key];
    if (event.key === "Escape") this.pick(null);
    else if (next !== undefined && last >= 0) this.pick(this.places[next].point.name);
    else return;
    event.preventDefault();
  }

  point(event) {
    const box = this.area.getBoundingClientRect();
    const away = (place) => Math.hypot(place.x - (event.clientX - box.left), place.y - (event.clientY - box.top));
    const nearest = this.places.reduce((best, place) => (best && away(best) <= away(place) ? best : place), null);
    if (nearest) this.pick(nearest.point.name);
  }

  pick(name) {
    if (name === this.picked) return;
    this.picked = name;
    this.encircle();
    this.tell();
    this.onpick(name);
  }

  encircle() {
    if (!this.ring) return;
    const place = this.places.find(({ point }) => point.name === this.picked);
    this.ring.setAttribute("visibility", place ? "visible" : "hidden");
    if (!place) return;
    this.ring.setAttribute("cx", place.x);
    this.ring.setAttribute("cy", place.y);
  }

  tell() {
    const point = this.plot?.points.find(({ name }) => name === this.picked);
    if (!point) {
      text(by("picked"), "");
      return;
    }
    const value = point.value === null ? "no value known" : `${this.plot.metric} ${spelled(point.value)}`;
    text(by("picked"), `step ${point.step}: ${value}, ${point.kind}${point.note ? ` (${point.note})` : ""}`);
  }
}

// As many digits as tell neighbours apart, and not those that binary fractions bring along.
function short(value) {
  return String(Number(value.toPrecision(12)));
}
