// Curves of one or several runs over each other; runs that differ in their seed are thin lines with their mean.

import { Chart } from "./chart.js";
import { h } from "./dom.js";

const COLOURS = 8;
const DASHES = [null, "6 4", "2 3", "9 3 2 3"];
const ALWAYS = [
  ["Learning", [
    { title: "Reward", unit: "mean of a step", keys: ["reward"], zero: true, help: "Thin: every step. Bold: smoothed." },
    { title: "Evaluation", unit: "mean@k", match: /^evaluation\//, zero: true, marks: true, absent: "not evaluated" },
    { title: "Reward parts", unit: "mean of a step", match: /^rewards\/.*\/mean$/, zero: true },
    { title: "Groups without a gradient", unit: "share", keys: ["frac_reward_zero_std"], zero: true, top: 1, help: "All completions of the group have the same reward." },
    { title: "Completion length", unit: "tokens", keys: ["completions/mean_length", "completions/max_length"], names: ["mean", "longest"], zero: true },
    { title: "Truncated", unit: "share", keys: ["completions/clipped_ratio"], zero: true },
  ]],
  ["How far off-policy", [
    { title: "Lag", unit: "steps", keys: ["lag/mean", "lag/max"], zero: true, names: ["mean", "oldest"], jagged: true, help: "Learner step minus the step of the weights that generated." },
    { title: "Lag by pool", unit: "steps", match: /^lag\/by_pool\//, zero: true, jagged: true },
    { title: "KL divergence", unit: "nats per token", keys: ["mismatch_kl"], log: true, help: "k3 estimate from sampler to learner, before the update." },
    { title: "Importance weight", unit: "variance", keys: ["weight/variance"], log: true, help: "Of the loss's own weights; grows with the lag." },
    { title: "Effective sample size", unit: "share", keys: ["weight/ess"], zero: true, top: 1 },
    { title: "Dropped rollouts", unit: "too old, in all", keys: ["lag/dropped"], zero: true },
  ]],
  ["Optimization", [
    { title: "Loss", keys: ["loss"] },
    { title: "Gradient norm", keys: ["grad_norm"], zero: true, help: "Before it is scaled down to maxGradNorm." },
    { title: "Clipped", unit: "share", match: /^clip_ratio\/(low_mean|high_mean|region_mean)$/, zero: true },
    { title: "Masked or rejected", unit: "share", match: /^correction\/(truncated|masked|rejected|opsm|m2po|zero)$/, zero: true, absent: "this run has no correction", help: "By algorithm.correction: tokens, or whole completions (rejected, opsm)." },
    { title: "Entropy", unit: "nats per token", match: /^entropy/, zero: true },
    { title: "Learning rate", keys: ["learning_rate"], zero: true },
  ]],
  ["Speed", [
    { title: "Learner speed", unit: "tokens/s", keys: ["perf/tokens_per_s"], zero: true },
    { title: "Step time", unit: "seconds", keys: ["step_time", "perf/rollout_wait_s"], names: ["whole", "waiting for rollouts"], zero: true },
    { title: "Learner waits", unit: "share of the time", keys: ["waiting"], zero: true, top: 1 },
  ]],
];

export class CurvesTab {
  /** `whole`: all charts are drawn at once, as a file is printed. */
  constructor(ask, ids, root = "", { whole = false } = {}) {
    Object.assign(this, { ask, ids });
    this.range = null;
    this.xName = "step";
    this.smooth = true;
    this.drawn = "";
    this.charts = new Map();
    this.visible = new Set();
    this.watch = new IntersectionObserver((entries) => this.seen(entries), { rootMargin: whole ? "100000px" : "200px" });
    this.legend = h("ul.legend", { "aria-label": "Runs" });
    this.reset = h("button", { type: "button", hidden: true, click: () => this.zoom(null) }, "Show all");
    this.body = h("div");
    this.element = h("div", {}, h("div.tools", {},
      this.choice("x axis", [["step", "Steps"], ["time", "Time"]], (value) => { this.xName = value; this.range = null; this.zoom(null); }),
      this.choice("lines", [[true, "Smoothed"], [false, "Raw"]], (value) => { this.smooth = value; this.redraw(); }),
      this.reset, h("span.faint.small", {}, "Drag to zoom, double-click for all; arrow keys read values")), this.legend, this.body);
    this.answers = {};
  }

  choice(label, values, choose) {
    const group = h("div.segmented", { role: "group", "aria-label": label }, values.map(([value, words], i) =>
      h("button", { type: "button", "aria-pressed": String(i === 0), click: (event) => {
        for (const button of group.children) button.setAttribute("aria-pressed", String(button === event.currentTarget));
        choose(value);
      } }, words)));
    return group;
  }

  dispose() {
    this.watch.disconnect();
    for (const { chart } of this.charts.values()) chart.dispose();
  }

  async show(runs) {
    await this.refresh(runs);
  }

  async refresh(runs) {
    this.runs = runs;
    const keys = [...new Set(runs.flatMap((run) => run.keys ?? []))].sort();
    if (this.laidOut !== keys.join()) this.layOut(keys);
    const revision = runs.map((run) => `${run.revision}:${run.evaluations?.length}`).join();
    if (this.revision !== revision) {
      this.revision = revision;
      await this.load([...this.visible]);
    }
  }

  // ── which panels ──────────────────────────────────────────────────────────────────────────────────────────────────
  layOut(keys) {
    this.laidOut = keys.join();
    this.revision = null;
    this.watch.disconnect();
    for (const { chart } of this.charts.values()) chart.dispose();
    this.charts.clear();
    this.visible.clear();
    const used = new Set(["time", "step", "num_tokens"]);
    const sections = ALWAYS.map(([name, panels]) => [name, panels.map((panel) => ({ ...panel, keys: panel.keys ?? keys.filter((key) => panel.match.test(key)) }))]);
    for (const { keys: own, match } of ALWAYS.flatMap(([, panels]) => panels)) {
      for (const key of own ?? keys.filter((one) => match.test(one))) used.add(key);
    }
    const others = keys.filter((key) => !used.has(key)).map((key) => ({ title: key, keys: [key] }));
    const parts = sections.map(([name, panels]) => this.section(name, panels));
    if (others.length) {
      parts.push(h("details", {}, h("summary.section", {}, `${others.length} more`), this.section("", others)));
    }
    this.body.replaceChildren(...parts);
    this.drawLegend();
  }

  section(name, panels) {
    return h("section", {}, name && h("h2.section", {}, name), h("div.panels", {}, panels.map((panel) => {
      const chart = new Chart({ ...panel, onZoom: (range) => this.zoom(range) });
      this.charts.set(chart.element, { chart, panel });
      this.watch.observe(chart.element);
      return chart.element;
    })));
  }

  seen(entries) {
    const added = [];
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && !this.visible.has(target)) added.push(target);
      this.visible[isIntersecting ? "add" : "delete"](target);
    }
    if (added.length) this.load(added).catch(() => {});
  }

  // ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────
  async load(elements) {
    const keys = [...new Set(elements.flatMap((element) => this.charts.get(element)?.panel.keys ?? []))];
    const [from, to] = this.range ?? [null, null];
    const asked = { run: this.ids, key: keys, x: this.xName, points: 400, from, to };
    if (keys.length) Object.assign(this.answers, await this.ask("curves", asked));
    for (const element of elements) this.draw(element);
  }

  async zoom(range) {
    this.range = range && [Math.max(0, range[0]), range[1]];
    this.reset.hidden = !this.range;
    await this.load([...this.visible]);
  }

  redraw() {
    for (const element of this.visible) this.draw(element);
  }

  themed() {
    this.redraw();
  }

  families() {
    return [...new Set(this.runs.map((run) => run.family))];
  }

  drawLegend() {
    if (this.ids.length < 2) return this.legend.replaceChildren();
    this.legend.replaceChildren(...this.families().map((family, i) => {
      const members = this.runs.filter((run) => run.family === family);
      const words = members.length > 1 ? `${family} (mean of ${members.length} seeds)` : members[0].id;
      return h("li", {}, h("span.key", { style: `color:var(--c${i % COLOURS})` }), words);
    }));
  }

  draw(element) {
    const found = this.charts.get(element);
    if (!found) return;
    const { chart, panel } = found;
    const series = panel.keys.flatMap((key, k) => this.lines(panel, key, k));
    chart.update({ series, range: this.range, zero: panel.zero, top: panel.top, log: panel.log, xName: this.xName });
  }

  lines(panel, key, k) {
    const answer = this.answers[key];
    if (!answer) return [];
    const name = panel.names?.[k] ?? (panel.keys.length > 1 ? shortened(key) : "");
    const families = this.families();
    const single = this.ids.length === 1;
    const dash = single ? null : DASHES[k % DASHES.length];
    const lines = [];
    const isSmooth = this.smooth && !panel.marks && !panel.jagged; // smoothing would hide the sawtooth of a lag
    for (const { run, raw, smooth } of answer.runs) {
      const family = this.runs.find((one) => one.id === run).family;
      const colour = `var(--c${(single ? k : families.indexOf(family)) % COLOURS})`;
      const isSeed = Boolean(answer.means[family]);
      const [x, y] = isSmooth ? smooth : raw;
      const label = single ? name || panel.title : [isSeed ? run : family, name].filter(Boolean).join(" ");
      if (isSmooth && !isSeed && this.runs.length < 4) lines.push({ x: raw[0], y: raw[1], colour, width: 0.9, opacity: 0.3, name: label });
      lines.push({ x, y, colour, dash, name: label, marks: panel.marks, told: !isSeed, width: isSeed ? 0.9 : panel.jagged ? 1.2 : 1.9, opacity: isSeed ? 0.5 : 1 });
    }
    for (const [family, [x, y]] of Object.entries(answer.means)) {
      const colour = `var(--c${families.indexOf(family) % COLOURS})`;
      lines.push({ x, y, colour, dash, name: [family, name].filter(Boolean).join(" "), told: true, width: 2.4, marks: panel.marks });
    }
    return lines;
  }
}

function shortened(key) {
  return key.replace(/^(evaluation|rewards|lag\/by_pool|clip_ratio|correction)\//, "").replace(/\/mean$|_mean$/, "");
}
