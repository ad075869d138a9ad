// Completions that were trained: groups found by a filter, beside the histogram of their rewards; a group side by side.

import { h, number, speak } from "./dom.js";

const SIZE = 25;

export class CompletionsTab {
  constructor(ask, ids, root) {
    Object.assign(this, { ask, root });
    this.id = ids[0];
    this.page = 0;
    this.reward = null;
    this.colour = "none";
    this.element = h("div");
    this.inputs = {
      step_from: h("input", { type: "number", min: 0, placeholder: "first", change: () => this.find() }),
      step_to: h("input", { type: "number", min: 0, placeholder: "last", change: () => this.find() }),
      pool: h("select", { change: () => this.find() }),
      set: h("select", { change: () => this.find() }),
      truncated: h("select", { change: () => this.find() }, [["", "all"], ["yes", "truncated"], ["no", "complete"]].map(([value, words]) => h("option", { value }, words))),
    };
    this.bars = h("div.histogram", { role: "group", "aria-label": "Histogram of rewards: choose a bar to filter" });
    this.ends = h("div.ends");
    this.setField = h("label", { hidden: true }, "Data set", this.inputs.set);
    this.clear = h("button", { type: "button", style: "justify-content:center", click: () => this.clearAll() }, "Clear filters");
    this.filters = h(
      "form.filters.card", { "aria-label": "Filters", submit: (event) => event.preventDefault() },
      h("div", {}, h("div.soft.small", { style: "margin-bottom:.3rem" }, "Rewards"), this.bars, this.ends),
      h("div.pair", {}, h("label", {}, "From step", this.inputs.step_from), h("label", {}, "To step", this.inputs.step_to)),
      h("div.pair", {}, h("label", {}, "Sampler pool", this.inputs.pool), h("label", {}, "Completions", this.inputs.truncated)),
      this.setField, this.clear,
    );
    this.list = h("ol.groups", { "aria-label": "Groups" });
    this.found = h("p.soft.small", { role: "status", style: "margin:0 0 .6rem" });
    this.pager = h("div.pager");
    this.browse = h("div.browse", {}, this.filters, h("div", {}, this.found, h("div.card", {}, this.list, this.pager)));
    this.keys = (event) => this.key(event);
    document.addEventListener("keydown", this.keys);
  }

  dispose() {
    document.removeEventListener("keydown", this.keys);
  }

  async show(runs, rest) {
    this.number = rest.length ? Number(rest[0]) : null;
    if (this.number !== null) return this.open();
    this.element.replaceChildren(this.browse);
    await this.find(this.page);
  }

  async refresh() {
    if (this.number === null && this.page === 0 && !this.filters.contains(document.activeElement)) await this.find(0);
  }

  // ── the list ──────────────────────────────────────────────────────────────────────────────────────────────────────
  asked() {
    const asked = Object.fromEntries(Object.entries(this.inputs).map(([name, input]) => [name, input.value]));
    return { run: this.id, ...asked, reward_from: this.reward?.[0], reward_to: this.reward?.[1] };
  }

  clearAll() {
    for (const input of Object.values(this.inputs)) input.value = "";
    this.reward = null;
    this.find();
  }

  async find(page = 0) {
    this.page = page; // at once, or a refresh would ask for the page before and replace this question
    const answer = await this.ask("completions", { ...this.asked(), page, size: SIZE }, { replaces: "completions" });
    const text = JSON.stringify([answer, page, this.reward]);
    if (text === this.text) return;
    Object.assign(this, { answer, text });
    this.draw();
  }

  draw() {
    const { groups, found, completions, pools, sets, steps, damaged } = this.answer;
    if (!found && !this.answer.histogram.length && !steps[1]) {
      this.browse.replaceWith(this.browse = h("div.card.empty", {}, h("h2", {}, "No completions yet"), h("p", {}, "They are logged as they are trained, unless ", h("code", {}, "monitoring.logCompletions.maxMegabytes"), " is 0.")));
      this.text = null;
      return;
    }
    if (!this.browse.contains(this.list)) this.browse.replaceWith(this.browse = h("div.browse", {}, this.filters, h("div", {}, this.found, h("div.card", {}, this.list, this.pager))));
    this.found.textContent = `${number(completions)} completion${completions === 1 ? "" : "s"} in ${number(found)} group${found === 1 ? "" : "s"}` + (damaged ? `; ${damaged} damaged line${damaged === 1 ? " was" : "s were"} left out` : "");
    options(this.inputs.pool, pools, "all pools");
    options(this.inputs.set, sets, "all sets");
    this.setField.hidden = !sets.length;
    this.inputs.step_from.placeholder = steps[0];
    this.inputs.step_to.placeholder = steps[1];
    this.drawHistogram();
    this.scale = rewardScale(groups.flatMap((group) => group.rewards));
    this.list.replaceChildren(...groups.map((group) => this.item(group)));
    if (!groups.length) this.list.replaceChildren(h("li.empty", {}, "No group matches these filters."));
    const pages = Math.max(1, Math.ceil(found / SIZE));
    this.pager.replaceChildren(
      h("button", { type: "button", disabled: this.page === 0, click: () => this.find(this.page - 1) }, "Newer"),
      h("span.soft.small", {}, `page ${number(this.page + 1)} of ${number(pages)}`),
      h("button", { type: "button", disabled: this.page + 1 >= pages, click: () => this.find(this.page + 1) }, "Older"),
    );
  }

  drawHistogram() {
    const bars = this.answer.histogram;
    const most = Math.max(1, ...bars.map((bar) => bar.count));
    const same = (bar) => this.reward && this.reward[0] === bar.from && this.reward[1] === bar.to;
    this.bars.replaceChildren(...bars.map((bar) => {
      const what = bar.from === bar.to ? `reward ${number(bar.from)}` : `rewards ${number(bar.from)} to ${number(bar.to)}`;
      const height = bar.count ? Math.max(2, (bar.count / most) * 100) : 0;
      return h("button", { type: "button", "aria-pressed": String(Boolean(same(bar))), "aria-label": `${what}: ${number(bar.count)} completions`, title: `${what}: ${number(bar.count)}`, click: () => {
        this.reward = same(bar) ? null : [bar.from, bar.to];
        this.find();
      } }, h("i", { style: `height:${height}%` }));
    }));
    const [low, high] = [bars[0]?.from, bars.at(-1)?.to];
    this.ends.replaceChildren(h("span", {}, number(low)), h("span", {}, this.reward ? "filtered" : "choose a bar"), h("span", {}, number(high)));
  }

  item(group) {
    const mean = group.rewards.reduce((a, b) => a + b, 0) / group.rewards.length;
    return h("li", {}, h(
      "a", { href: `${this.root}/completions/${group.number}`, "aria-label": `Step ${group.step}, ${group.slot}, mean reward ${number(mean)}: ${group.prompt}` },
      h("span.nowrap", {}, h("span.faint", {}, "step "), number(group.step)), h("span.soft.small.nowrap", {}, `${group.slot} · lag ${group.lag}`),
      h("span.prompt.mono", {}, group.prompt), h("span.dots", {}, group.rewards.map((reward) => h("i", { style: `background:${this.scale(reward)}`, title: number(reward) }))),
      h("b.number", { style: "text-align:right" }, number(mean)),
    ));
  }

  // ── a group ───────────────────────────────────────────────────────────────────────────────────────────────────────
  async open() {
    const group = await this.ask("group", { run: this.id, number: this.number }, { replaces: "group" });
    this.group = group;
    this.drawGroup();
    speak(`Group of step ${group.step}`);
  }

  key(event) {
    if (this.number === null || this.number === undefined || event.target.matches?.("input, select") || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") location.hash = `${this.root}/completions`;
    else if (event.key === "j" && this.number > 0) location.hash = `${this.root}/completions/${this.number - 1}`;
    else if (event.key === "k") location.hash = `${this.root}/completions/${this.number + 1}`;
  }

  drawGroup() {
    const { group } = this;
    const rewards = group.completions.map((one) => one.reward);
    const most = Math.max(1e-9, ...group.completions.map((one) => Math.abs(one.advantage ?? 0)));
    const scale = rewardScale(rewards);
    const choose = (value, words) => h("button", { type: "button", "aria-pressed": String(this.colour === value), click: () => { this.colour = value; this.drawGroup(); } }, words);
    const mean = rewards.reduce((a, b) => a + b, 0) / rewards.length;
    this.element.replaceChildren(
      h("div.group-head", {},
        h("div.row", {}, h("a.button", { href: `${this.root}/completions` }, "← All groups"), h("b", {}, `Step ${number(group.step)}`), h("span.soft.small", {}, `${group.slot} · lag ${group.lag} · problem ${group.row ?? "–"} · mean reward ${number(mean)}`),
          h("span.grow"), h("div.segmented", { role: "group", "aria-label": "Colour of the tokens" }, choose("none", "Plain"), choose("ratio", "Ratio"), choose("version", "Version"))),
        this.colour === "ratio" && h("p.small.soft", { style: "margin:0" }, h("span.swatch", { style: `background:${ratioColour(0.5)}` }), "less likely under the learner than under the sampler  ", h("span.swatch", { style: `background:${ratioColour(2)};margin-left:1rem` }), "more likely. Point at a token for its ratio."),
        this.colour === "version" && h("p.small.soft", { style: "margin:0" }, "A colour for each version of the weights that made the tokens."),
        h("div.texts", {}, text("Prompt", group.prompt), text("Reference", group.reference ?? "none")),
      ),
      h("div.side", {}, group.completions.map((one, i) => this.completion(one, i, scale, most))),
      h("p.faint.small", {}, "j and k: older and newer group. Esc: all groups."),
    );
  }

  completion(one, i, scale, most) {
    const share = ((one.advantage ?? 0) / most) * 50;
    const parts = Object.entries(one.parts ?? {});
    return h(
      "article.completion.card", { "aria-label": `Completion ${i + 1}, reward ${number(one.reward)}`, style: `border-top-color:${scale(one.reward)}` },
      h("div.row", { style: "justify-content:space-between" }, h("span.reward", {}, number(one.reward)), h("span.soft.small", {}, `advantage ${one.advantage > 0 ? "+" : ""}${number(one.advantage)}`)),
      h("div.advantage", { "aria-hidden": "true" }, h("i", { style: `background:${share < 0 ? "var(--c1)" : "var(--c2)"};left:${50 + Math.min(0, share)}%;width:${Math.abs(share)}%` })),
      h("div.chips", {}, parts.length > 1 && parts.map(([name, value]) => h("span.chip", {}, `${name} ${number(value)}`)), h("span.chip", {}, `${one.pieces.length} token${one.pieces.length === 1 ? "" : "s"}`), one.truncated && h("span.chip.cut", {}, "truncated"),
        this.colour === "ratio" && !one.ratios && h("span.chip", {}, "ratios not known: another rank trained it")),
      h("pre", { tabindex: 0, "aria-label": `Text of completion ${i + 1}` }, this.tokens(one)),
    );
  }

  tokens(one) {
    const versions = (one.versions ?? []).flatMap(([version, count]) => Array(count).fill(version));
    const kinds = [...new Set((this.group.completions ?? []).flatMap((other) => (other.versions ?? []).map(([version]) => version)))];
    return one.pieces.map((piece, i) => {
      const ratio = one.ratios?.[i];
      let style = "", title = "";
      if (this.colour === "ratio" && ratio !== undefined && ratio !== null) [style, title] = [`background:${ratioColour(ratio)}`, `ratio ${number(ratio)}`];
      if (this.colour === "version" && versions[i] !== undefined) [style, title] = [`background:color-mix(in srgb, var(--c${kinds.indexOf(versions[i]) % 8}) 30%, transparent)`, `v${versions[i]}`];
      return h(/^<\|.*\|>$/.test(piece) ? "span.tok.special" : "span.tok", { style, title: title || null }, piece);
    });
  }
}

function text(label, words) {
  return h("section.text.card", { "aria-label": label }, h("div.label", {}, label), h("pre", { tabindex: 0 }, words));
}

function options(select, values, all) {
  const chosen = select.value;
  if (select.options.length === values.length + 1) return;
  select.replaceChildren(h("option", { value: "" }, all), ...values.map((value) => h("option", { value }, value)));
  select.value = chosen;
}

/** Rewards as colours, from the lowest of those shown (faint) to the highest. */
function rewardScale(rewards) {
  const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
  return (reward) => {
    const share = high > low ? (reward - low) / (high - low) : reward > 0 ? 1 : 0;
    return `color-mix(in srgb, var(--c2) ${Math.round(share * 100)}%, var(--line))`;
  };
}

/** Orange below 1, blue above, stronger the farther away; a factor of e is full. */
function ratioColour(ratio) {
  const far = Math.min(1, Math.abs(Math.log(Math.max(ratio, 1e-9))));
  return `color-mix(in srgb, var(--c${ratio < 1 ? 1 : 0}) ${Math.round(far * 60)}%, transparent)`;
}
