// Line charts as SVG: a cursor shared by all charts of a page, zoom by dragging, everything by keyboard as well.

import { h, number, speak } from "./dom.js";

const MARGIN = { top: 8, right: 10, bottom: 22, left: 46 };
const cursors = new Set();

/** Show the cursor at x in every chart; null takes it away. */
function point(x) {
  for (const follow of cursors) follow(x);
}

/**
 * A chart in a panel. `update({series, range, zero, top, log, xName})` draws:
 * series {name, colour, width, opacity, dash, x, y, told, marks}, range [from, to] or null for all of it.
 * `onZoom(range)` is called with what was chosen, null for all.
 */
export class Chart {
  constructor({ title, unit = "", help = "", absent = "nothing recorded", onZoom }) {
    this.title = title;
    this.absent = absent;
    this.onZoom = onZoom;
    this.now = h("div.now");
    this.plot = h("div.plot");
    this.element = h(
      "section.panel.card", { "aria-label": title },
      h("header", {}, h("h3", {}, title, h("span.unit", {}, unit))),
      this.now, this.plot, help && h("p.help", {}, help),
    );
    this.state = null;
    this.at = null;
    this.follow = (x) => this.showCursor(x);
    cursors.add(this.follow);
    this.watch = new ResizeObserver(() => this.state && this.draw());
    this.watch.observe(this.plot);
  }

  dispose() {
    cursors.delete(this.follow);
    this.watch.disconnect();
  }

  update(state) {
    this.state = state;
    this.draw();
  }

  // ── scales ────────────────────────────────────────────────────────────────────────────────────────────────────────
  measure() {
    const { series, range, zero, top, log } = this.state;
    let [low, high, bottom, ceiling] = [Infinity, -Infinity, Infinity, -Infinity];
    let positive = Infinity;
    for (const line of series) {
      for (let i = 0; i < line.x.length; i++) {
        const [x, y] = [line.x[i], line.y[i]];
        if (!range) [low, high] = [Math.min(low, x), Math.max(high, x)];
        else if (x < range[0] || x > range[1]) continue;
        if (y === null) continue;
        bottom = Math.min(bottom, y);
        ceiling = Math.max(ceiling, y);
        if (y > 0) positive = Math.min(positive, y);
      }
    }
    if (range) [low, high] = range;
    if (!(ceiling >= bottom)) [bottom, ceiling] = [0, 1];
    this.log = log && ceiling > 30 * positive;
    if (this.log) bottom = Math.max(positive, ceiling * 1e-6);
    else {
      if (zero && bottom >= 0) bottom = 0;
      if (top !== undefined) ceiling = Math.max(top, ceiling);
      if (ceiling === bottom) [bottom, ceiling] = [bottom === 0 ? 0 : bottom - Math.abs(bottom) * 0.1, ceiling + (Math.abs(ceiling) * 0.1 || 1)];
      const room = (ceiling - bottom) * 0.05;
      ceiling += room;
      bottom -= room; // so that values of 0 do not lie on the axis
    }
    this.domain = { low, high: high > low ? high : low + 1, bottom, ceiling };
  }

  px(x) {
    return MARGIN.left + ((x - this.domain.low) / (this.domain.high - this.domain.low)) * this.inner.width;
  }

  py(y) {
    const { bottom, ceiling } = this.domain;
    const share = this.log ? Math.log(Math.max(y, bottom) / bottom) / Math.log(ceiling / bottom) : (y - bottom) / (ceiling - bottom);
    return MARGIN.top + (1 - share) * this.inner.height;
  }

  xAt(px) {
    const share = Math.min(1, Math.max(0, (px - MARGIN.left) / this.inner.width));
    return this.domain.low + share * (this.domain.high - this.domain.low);
  }

  // ── drawing ───────────────────────────────────────────────────────────────────────────────────────────────────────
  draw() {
    const known = this.state.series.some((line) => line.x.length);
    if (!known) {
      this.plot.replaceChildren(h("div.nothing", {}, this.absent));
      this.now.replaceChildren();
      this.svg = null;
      return;
    }
    const { width, height } = this.plot.getBoundingClientRect();
    if (width < 20) return;
    this.inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    this.measure();
    const focused = document.activeElement === this.svg;
    this.overlay = h("g");
    this.svg = h(
      "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": this.describe() },
      this.axes(width, height), this.state.series.map((line) => this.line(line)), this.overlay,
    );
    this.listen();
    this.plot.replaceChildren(this.svg);
    if (focused) this.svg.focus();
    this.showCursor(this.at);
  }

  axes(width, height) {
    const { low, high, bottom, ceiling } = this.domain;
    const parts = [];
    for (const y of this.log ? decades(bottom, ceiling) : ticks(bottom, ceiling, 4)) {
      parts.push(h("line.grid", { x1: MARGIN.left, x2: width - MARGIN.right, y1: this.py(y), y2: this.py(y) }));
      parts.push(h("text", { x: MARGIN.left - 6, y: this.py(y) + 3.5, "text-anchor": "end" }, tickText(y)));
    }
    for (const x of ticks(low, high, Math.max(2, Math.floor(width / 90)))) {
      const text = this.state.xName === "time" ? clockText(x) : tickText(x);
      parts.push(h("text", { x: this.px(x), y: height - 6, "text-anchor": "middle" }, text));
    }
    parts.push(h("line.axis", { x1: MARGIN.left, x2: width - MARGIN.right, y1: height - MARGIN.bottom, y2: height - MARGIN.bottom }));
    return parts;
  }

  line({ x, y, colour, width = 1.8, opacity = 1, dash, marks }) {
    let path = "", pen = false;
    const points = [];
    for (let i = 0; i < x.length; i++) {
      if (y[i] === null) { pen = false; continue; }
      const [a, b] = [this.px(x[i]), this.py(y[i])];
      path += `${pen ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`;
      pen = true;
      if ((marks || x.length === 1) && a >= MARGIN.left - 1) points.push(h("circle", { cx: a, cy: b, r: 3, fill: colour }));
    }
    const clip = `clip-path: inset(-6px ${MARGIN.right - 4}px ${MARGIN.bottom - 4}px ${MARGIN.left - 3}px) view-box`;
    return h("g", { style: clip, opacity }, h("path", { d: path, stroke: colour, "stroke-width": width, "stroke-dasharray": dash }), points);
  }

  describe() {
    const words = this.state.series.filter((line) => line.told).slice(0, 4).map((line) => {
      const known = line.y.filter((y) => y !== null);
      return known.length ? `${line.name}: ${number(known[0])} at first, ${number(known.at(-1))} last` : `${line.name}: nothing`;
    });
    return `${this.title}. ${words.join("; ")}. Arrow keys read values, plus and minus zoom, 0 shows all.`;
  }

  // ── cursor and zoom ───────────────────────────────────────────────────────────────────────────────────────────────
  listen() {
    let from = null;
    const place = (event) => this.xAt(event.clientX - this.svg.getBoundingClientRect().left);
    this.svg.addEventListener("pointermove", (event) => {
      point(place(event));
      if (from !== null) this.brush = [from, place(event)], this.showCursor(this.at);
    });
    this.svg.addEventListener("pointerleave", () => from === null && point(null));
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.button || event.pointerType === "touch") return;
      from = place(event);
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const [a, b] = [from, place(event)].sort((one, two) => one - two);
      from = this.brush = null;
      if (this.px(b) - this.px(a) > 6) this.onZoom?.([a, b]);
      else this.showCursor(this.at);
    });
    this.svg.addEventListener("dblclick", () => this.onZoom?.(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.svg.addEventListener("blur", () => point(null));
  }

  key(event) {
    const { low, high } = this.domain;
    const at = this.at ?? (low + high) / 2;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const step = ((high - low) / 40) * (event.key === "ArrowLeft" ? -1 : 1);
      point(Math.min(high, Math.max(low, at + step)));
      speak(`${this.xText(this.at)}: ${this.now.textContent}`);
    } else if (event.key === "+" || event.key === "=" || event.key === "-") {
      const half = ((high - low) / 2) * (event.key === "-" ? 2 : 0.5);
      this.onZoom?.([at - half, at + half]);
    } else if (event.key === "0" || event.key === "Escape") this.onZoom?.(null);
    else return;
    event.preventDefault();
  }

  xText(x) {
    return this.state.xName === "time" ? clockText(x) : `step ${Math.round(x).toLocaleString("en")}`;
  }

  showCursor(x) {
    this.at = x;
    if (!this.svg) return;
    const told = this.state.series.filter((line) => line.told);
    const parts = [], values = [];
    if (this.brush) {
      const [a, b] = this.brush.map((value) => this.px(value)).sort((one, two) => one - two);
      parts.push(h("rect.brush", { x: a, y: MARGIN.top, width: b - a, height: this.inner.height }));
    }
    const shown = x !== null && x >= this.domain.low && x <= this.domain.high;
    if (shown) {
      parts.push(h("line.cross", { x1: this.px(x), x2: this.px(x), y1: MARGIN.top, y2: MARGIN.top + this.inner.height }));
    }
    for (const line of told) {
      const i = shown ? nearest(line.x, x) : lastKnown(line.y);
      if (i < 0 || line.y[i] === null || line.y[i] === undefined) continue;
      if (shown) parts.push(h("circle", { cx: this.px(line.x[i]), cy: this.py(line.y[i]), r: 3.5, fill: line.colour }));
      values.push(h("span", { style: `color:${line.colour}` }, told.length > 1 ? `${line.name} ` : "", h("b", {}, number(line.y[i]))));
    }
    this.overlay.replaceChildren(...parts);
    this.now.replaceChildren(...(shown ? [h("span", {}, this.xText(x))] : []), ...values);
  }
}

function nearest(xs, x) {
  let [low, high] = [0, xs.length - 1];
  if (high < 0 || x < xs[0] - (xs[high] - xs[0]) * 0.02 || x > xs[high] + (xs[high] - xs[0]) * 0.02) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle;
    else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

function lastKnown(ys) {
  let i = ys.length - 1;
  while (i >= 0 && ys[i] === null) i--;
  return i;
}

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.75);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

function decades(low, high) {
  const found = [];
  const [first, last] = [Math.ceil(Math.log10(low)), Math.floor(Math.log10(high))];
  const every = Math.max(1, Math.ceil((last - first + 1) / 5));
  for (let power = first; power <= last; power += every) found.push(10 ** power);
  return found.length > 1 ? found : [low, high];
}

function tickText(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size > 0 && size < 1e-3) return value.toExponential(0);
  return String(+value.toPrecision(3));
}

function clockText(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${+(seconds / 60).toFixed(1)} min`;
  return `${+(seconds / 3600).toFixed(1)} h`;
}

/** Values as a small line without axes. */
export function sparkline(values, label) {
  const known = values.filter((value) => value !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const points = values.map((value, i) => [
    (i / Math.max(1, values.length - 1)) * 116 + 2,
    value === null ? null : 27 - ((value - low) / (high - low || 1)) * 24,
  ]).filter(([, y]) => y !== null);
  const path = points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  return h(
    "svg.spark", { viewBox: "0 0 120 30", preserveAspectRatio: "none", role: "img", "aria-label": label },
    h("path", { d: path, fill: "none", stroke: "var(--accent)", "stroke-width": 1.8, "vector-effect": "non-scaling-stroke" }),
  );
}
