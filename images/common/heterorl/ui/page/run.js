// One run, or several over each other: what it is at, and its tabs.

import { CompletionsTab } from "./completions.js";
import { CurvesTab } from "./curves.js";
import { duration, h, number, percent } from "./dom.js";
import { EvaluationTab } from "./evaluation.js";
import { bar, pill } from "./runs.js";
import { SamplersTab } from "./samplers.js";
import { SettingsTab } from "./settings.js";

const TABS = {
  curves: ["Curves", CurvesTab],
  samplers: ["Samplers", SamplersTab],
  completions: ["Completions", CompletionsTab],
  evaluation: ["Evaluation", EvaluationTab],
  settings: ["Settings", SettingsTab],
};
const OF_SEVERAL = ["curves", "settings"];

export class RunPage {
  constructor(ask, ids) {
    Object.assign(this, { ask, ids });
    this.hero = h("div.hero");
    this.nav = h("nav.tabs", { "aria-label": "Views of the run" });
    this.body = h("div");
    this.element = h("div", {}, this.hero, this.nav, this.body);
    this.tab = null;
    this.runs = [];
  }

  dispose() {
    this.tab?.dispose();
  }

  themed() {
    this.tab?.themed?.();
  }

  async show(place) {
    this.place = place;
    const several = this.ids.length > 1;
    const names = several ? OF_SEVERAL : Object.keys(TABS);
    const name = names.includes(place.tab) ? place.tab : "curves";
    const root = `#/${several ? "compare" : "run"}/${this.ids.map(encodeURIComponent).join(",")}`;
    this.nav.replaceChildren(...names.map((key) =>
      h("a", { href: `${root}/${key}`, "aria-current": key === name ? "page" : null }, TABS[key][0])));
    await this.read();
    const here = this.nav.querySelector("[aria-current]");
    this.nav.scrollLeft = here.offsetLeft - this.nav.offsetLeft - (this.nav.clientWidth - here.clientWidth) / 2;
    if (this.name !== name) {
      this.tab?.dispose();
      this.name = name;
      this.tab = new TABS[name][1](this.ask, this.ids, root);
      this.body.replaceChildren(this.tab.element);
    }
    await this.tab.show(this.runs, place.rest ?? []);
  }

  async refresh() {
    if (!this.tab) return this.show(this.place); // the run was not there yet, or could not be read
    await this.read();
    await this.tab.refresh(this.runs);
  }

  async read() {
    this.runs = await Promise.all(this.ids.map((run) => this.ask("run", { run })));
    this.hero.replaceChildren(...(this.runs.length > 1 ? several(this.runs) : this.one(this.runs[0])));
  }

  one(run) {
    const about = [run.loss, run.samplers && `${run.samplers} sampler${run.samplers === 1 ? "" : "s"}`, run.folder].filter(Boolean).join(" · ");
    const parts = [
      h("div.row", {}, h("h1", {}, run.title ?? run.id), pill(run.state), h("span.soft.small", {}, about)),
    ];
    if (run.state === "unreadable") return [...parts, h("p.notice.bad", {}, h("b", {}, "This folder cannot be read"), run.why)];
    const share = run.steps ? run.step / run.steps : 0;
    const times = [run.elapsed_s && `${duration(run.elapsed_s)} elapsed`, run.eta_s && `${duration(run.eta_s)} to go`].filter(Boolean).join(" · ");
    parts.push(h("div.progress", {}, h("b.nowrap", {}, `${number(run.step)} / ${number(run.steps)}`), bar(run), h("span.soft.small.nowrap", {}, percent(share)), h("span.soft.small", {}, times)));
    if (run.in_the_way.length) {
      parts.push(h(`div.notice${run.state === "failed" ? ".bad" : ""}`, { role: "status" }, h("b", {}, "What is in the way"), run.in_the_way.map((words) => h("div", {}, words))));
    }
    if (this.place.tab === "curves") parts.push(h("div.tiles", {}, tiles(run)));
    return parts;
  }
}

/** The runs beside each other: best, last and their gap of each evaluation set, as in the paper's table. */
function several(runs) {
  const labels = [...new Set(runs.flatMap((run) => run.evaluations.flatMap((one) => Object.keys(one.sets))))];
  const heads = ["run", "state", "step", "reward, first → last tenth", "lag, mean (most)", ...labels.map((label) => `${label}: best / last / gap`)];
  const rows = runs.map((run) => {
    const [first, last] = run.rewards;
    return h("tr", {},
      h("td", {}, h("a", { href: `#/run/${encodeURIComponent(run.id)}/curves` }, run.id)), h("td", {}, pill(run.state)), h("td.number", {}, `${number(run.step)} / ${number(run.steps)}`),
      h("td.number", {}, last === undefined ? "–" : `${number(first)} → ${number(last)}`), h("td.number", {}, `${number(run.lag_mean)} (${number(run.lag_max)})`),
      labels.map((label) => {
        const values = run.evaluations.map((one) => one.sets[label]?.mean).filter((value) => value !== undefined);
        const best = Math.max(...values);
        return h("td.number", {}, values.length ? `${number(best)} / ${number(values.at(-1))} / ${number(best - values.at(-1))}` : "–");
      }));
  });
  return [h("h1", {}, `${runs.length} runs`), h("div.wide.card", {}, h("table", {},
    h("thead", {}, h("tr", {}, heads.map((words, i) => h(i > 1 ? "th.number" : "th", { scope: "col" }, words)))), h("tbody", {}, rows)))];
}

/** What a run came to, in a few large numbers. */
export function tiles(run) {
  const [first, last] = run.rewards ?? [];
  const found = [
    ["Reward", last === undefined ? "–" : `${number(first)} → ${number(last)}`, "first and last tenth of the steps"],
    ["Lag", number(run.lag_mean), run.lag_max ? `steps; at most ${number(run.lag_max)}` : "steps"],
    ["Learner", run.step ? `${number(Math.round(run.tokens_per_s))} tok/s` : "–", run.step ? `waits for rollouts ${percent(run.waiting)} of the time` : "no step yet"],
  ];
  for (const label of Object.keys(run.evaluations.at(-1)?.sets ?? {})) {
    const values = run.evaluations.map((one) => one.sets[label]?.mean).filter((value) => value !== undefined);
    found.push([`Evaluation: ${label}`, values.length > 1 ? `${number(values[0])} → ${number(values.at(-1))}` : number(values[0]), `best ${number(Math.max(...values))}`]);
  }
  return found.slice(0, 8).map(([label, big, under]) =>
    h("div.tile.card", {}, h("div.label", {}, label), h("div.big", {}, big), h("div.under", {}, under)));
}
