// What each sampler did when: a strip a slot, coloured by the lag of its weights; and how it is now.

import { duration, h, number, percent, speak } from "./dom.js";

const STRETCHES = 300;
const SHADES = 48;

export class SamplersTab {
  constructor(ask, ids) {
    Object.assign(this, { ask, ids });
    this.mode = "lag";
    this.told = h("div.soft.small", { style: "min-height:1.5em" }, "Point at a strip, or walk along it with the arrow keys.");
    this.strips = h("div.lanes.card");
    this.table = h("div.wide.card");
    const pick = (mode, words, pressed) => h("button", { type: "button", "aria-pressed": String(pressed), click: (event) => {
      this.mode = mode;
      for (const button of event.currentTarget.parentElement.children) button.setAttribute("aria-pressed", String(button === event.currentTarget));
      this.draw();
    } }, words);
    this.scale = h("span.scale");
    this.element = h(
      "div", {},
      h("div.tools", {}, h("div.segmented", { role: "group", "aria-label": "Colour" }, pick("lag", "Lag", true), pick("waiting", "Waiting", false)), this.scale),
      this.strips, h("h2", { style: "margin-top:1.6rem" }, "Each sampler"), this.table,
    );
  }

  dispose() {}

  async show(runs) {
    await this.refresh(runs);
  }

  async refresh(runs) {
    this.run = runs[0];
    const answer = await this.ask("timeline", { run: this.ids[0], points: STRETCHES }, { replaces: "timeline" });
    const text = JSON.stringify(answer);
    if (text !== this.text) {
      this.text = text;
      this.answer = answer;
      this.draw();
    }
    this.drawTable();
  }

  // ── strips ────────────────────────────────────────────────────────────────────────────────────────────────────────
  draw() {
    if (!this.answer) return;
    const { lanes, from, to } = this.answer;
    if (!lanes.length) {
      this.strips.replaceChildren(h("p.empty", {}, "No sampler has started yet."));
      return;
    }
    this.top = Math.max(1, ...lanes.flatMap((lane) => lane.lag.filter((lag) => lag !== null)));
    const focused = document.activeElement?.dataset?.slot;
    const strips = lanes.map((lane) => this.strip(lane));
    this.strips.replaceChildren(
      ...lanes.map((lane, i) => h("div.lane", {}, h("div.slot", {}, lane.slot, h("div.faint.small", { style: "font-weight:400" }, `${number(lane.swap_count)} swaps`)), strips[i])),
      h("div.lane", {}, h("span"), h("div.ends", {}, h("span", {}, "0 s"), h("span", {}, `${duration((to - from) / 2)}`), h("span", {}, duration(to - from)))),
      this.told,
    );
    this.scale.replaceChildren(...this.key());
    if (focused) strips.find((strip) => strip.dataset.slot === focused)?.focus();
  }

  key() {
    const stops = [0, 1 / 3, 2 / 3, 1].map((share) => colourOf(share)).join(",");
    const [low, high] = this.mode === "lag" ? ["lag 0", `${number(this.top)} steps behind the learner`] : ["works", "waits for room or weights"];
    return [h("span", {}, low), h("i", { style: `background:linear-gradient(90deg, ${stops})` }), h("span", {}, high), h("span", {}, h("span.swatch", { style: "background:var(--grid)" }), "away, or no weights yet"),
      this.answer.lanes.some((lane) => lane.refusals.length) && h("span", {}, h("span.swatch", { style: "background:var(--bad);width:.25rem" }), "refused a version")].filter(Boolean);
  }

  strip(lane) {
    const count = lane.lag.length;
    const known = lane.lag.filter((lag) => lag !== null);
    const mean = known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
    const { from, to } = this.answer;
    const strip = h(
      "svg", { viewBox: `0 0 ${count} 1`, preserveAspectRatio: "none", tabindex: 0, role: "img", "data-slot": lane.slot, "aria-label": `${lane.slot}: mean lag ${number(mean)} steps, ${lane.swap_count} swaps${lane.refusals.length ? `, ${lane.refusals.length} times a version was refused` : ""}. Arrow keys read it.` },
      runs(lane.lag.map((_, i) => this.colour(lane, i))).map(([begin, end, fill]) => h("rect", { x: begin, width: end - begin + 0.02, height: 1, fill })),
      [["line.swap", lane.swaps], ["line.refusal", lane.refusals]].flatMap(([name, times]) =>
        times.map((time) => ((time - from) / (to - from)) * count).map((x) => h(name, { x1: x, x2: x, y1: 0, y2: 1 }))),
    );
    let at = 0;
    const tell = (i) => {
      at = Math.min(count - 1, Math.max(0, i));
      this.told.textContent = this.words(lane, at);
    };
    strip.addEventListener("pointermove", (event) => {
      const box = strip.getBoundingClientRect();
      tell(Math.floor(((event.clientX - box.left) / box.width) * count));
    });
    strip.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -5, ArrowRight: 5, Home: -1e9, End: 1e9 }[event.key];
      if (!step) return;
      event.preventDefault();
      tell(at + step);
      speak(this.told.textContent);
    });
    return strip;
  }

  colour(lane, i) {
    const share = this.mode === "lag" ? (lane.lag[i] === null ? null : lane.lag[i] / this.top) : lane.waiting[i];
    const gone = lane.away[i] || lane.version[i] === null || share === null;
    return gone ? "var(--grid)" : colourOf(Math.round(share * SHADES) / SHADES);
  }

  words(lane, i) {
    const { from, to, learner } = this.answer;
    const at = duration(((i + 0.5) / lane.lag.length) * (to - from));
    if (lane.away[i]) return `${lane.slot} at ${at}: away`;
    const holds = lane.version[i] === null ? "has no weights yet" : `holds v${number(lane.version[i])}`;
    const behind = lane.lag[i] === null ? "" : `, ${number(Math.round(lane.lag[i]))} steps behind the learner (step ${number(learner[i])})`;
    return `${lane.slot} at ${at}: ${holds}${behind}; waits ${percent(lane.waiting[i])} of the time`;
  }

  // ── now ───────────────────────────────────────────────────────────────────────────────────────────────────────────
  drawTable() {
    const heads = [["sampler"], ["state"], ["version", 1], ["lag", 1], ["rollouts", 1], ["tok/s", 1], ["waited", 1], ["swaps", 1], ["refused", 1], ["canary Δ", 1]];
    const rows = (this.run.slots ?? []).map((row) => h(
      "tr", {}, h("td.nowrap", {}, h("b", {}, row.slot)), h("td", {}, row.activity || "not started"),
      ...[row.version, row.lag, row.rollouts, Math.round(row.tokens_per_s)].map((value) => h("td.number", {}, number(value))),
      h("td.number", {}, duration(row.waited_s)), h("td.number", {}, number(row.swaps)),
      h("td.number", { style: row.rejected ? "color:var(--bad)" : "" }, number(row.rejected)), h("td.number", {}, number(row.canary)),
    ));
    const refused = (this.run.slots ?? []).flatMap((row) => Object.entries(row.refused ?? {}).map(([version, why]) =>
      h("p.notice.bad", {}, h("b", {}, `${row.slot} refused ${version}`), why)));
    this.table.replaceChildren(h("table", {}, h("thead", {}, h("tr", {}, heads.map(([words, right]) => h(right ? "th.number" : "th", { scope: "col" }, words)))), h("tbody", {}, rows)), ...refused);
  }
}

/** Neighbours of one colour as [begin, end, colour]. */
function runs(colours) {
  const found = [];
  colours.forEach((colour, i) => {
    if (found.at(-1)?.[2] === colour) found.at(-1)[1] = i + 1;
    else found.push([i, i + 1, colour]);
  });
  return found;
}

const RAMP = [[126, 182, 222], [242, 208, 107], [224, 122, 63], [163, 38, 30]];

/** Blue over yellow to dark red, which colour-blind readers can tell apart. */
function colourOf(share) {
  const at = Math.min(1, Math.max(0, share)) * (RAMP.length - 1);
  const i = Math.min(RAMP.length - 2, Math.floor(at));
  const mixed = RAMP[i].map((from, k) => Math.round(from + (RAMP[i + 1][k] - from) * (at - i)));
  return `rgb(${mixed.join(" ")})`;
}
