// All runs: how far each is, its reward, and which to compare.

import { sparkline } from "./chart.js";
import { ago, h, number } from "./dom.js";

const WORDS = { silent: "no sign of life" };

export function pill(state) {
  return h(`span.pill.${state}`, {}, WORDS[state] ?? state);
}

export function bar(run) {
  const share = run.steps ? Math.min(1, run.step / run.steps) : 0;
  return h(
    `div.bar.${run.state}`,
    { role: "progressbar", "aria-valuemin": 0, "aria-valuemax": run.steps, "aria-valuenow": run.step, "aria-label": "steps" },
    h("i", { style: `width:${share * 100}%` }),
  );
}

export class RunsPage {
  constructor(ask) {
    this.ask = ask;
    this.chosen = new Set();
    this.search = h("input", { type: "search", placeholder: "Find a run", "aria-label": "Find a run", input: () => this.draw() });
    this.compare = h("button.primary", { type: "button", disabled: true, click: () => this.go() }, "Compare");
    this.count = h("span.soft");
    this.list = h("ul.runs.card", { "aria-label": "Runs" });
    this.element = h(
      "div", {},
      h("div.row.runs-head", {}, h("div.row", {}, h("h1", {}, "Runs"), this.count), h("div.row", {}, this.search, this.compare)),
      this.list,
    );
    this.answer = null;
  }

  dispose() {}

  async show() {
    await this.refresh();
  }

  async refresh() {
    const answer = await this.ask("runs");
    const same = this.answer && JSON.stringify(answer) === JSON.stringify(this.answer);
    this.answer = answer;
    if (!same || Date.now() - this.drawn > 10_000) this.draw(); // "2 minutes ago" grows as well
  }

  go() {
    const ids = [...this.chosen].map(encodeURIComponent).join(",");
    location.hash = `#/compare/${ids}/curves`;
  }

  draw() {
    this.drawn = Date.now();
    const { runs, folders } = this.answer;
    const focused = document.activeElement?.dataset?.run;
    this.count.textContent = runs.length ? `${runs.length} in ${folders.join(", ")}` : "";
    this.compare.disabled = this.chosen.size < 2;
    this.compare.textContent = this.chosen.size > 1 ? `Compare ${this.chosen.size}` : "Compare";
    if (!runs.length) {
      this.list.replaceChildren(h(
        "li.empty", {}, h("h2", {}, "No runs yet"),
        h("p", {}, "Nothing below ", h("code", {}, folders.join(", ")), " is a run. It will show here as soon as ", h("code", {}, "heterorl run"), " has started one."),
      ));
      return;
    }
    const words = this.search.value.trim().toLowerCase();
    const found = runs.filter((run) => `${run.id} ${run.loss ?? ""} ${run.state}`.toLowerCase().includes(words));
    found.sort((a, b) => (b.state === "running") - (a.state === "running") || (b.changed ?? 0) - (a.changed ?? 0));
    const head = h(
      "li.run.head", { "aria-hidden": "true" }, h("span", { style: "width:1.1rem" }), h("span", {}, "run"), h("span", {}, "state"), h("span", {}, "progress"),
      h("span.value", {}, "reward"), h("span"), h("span.value", {}, "lag"), h("span.last", {}, "last written"),
    );
    this.list.replaceChildren(head, ...found.map((run) => this.item(run)));
    if (!found.length) this.list.append(h("li.empty", {}, `No run matches “${words}”.`));
    if (focused) this.list.querySelector(`[data-run="${CSS.escape(focused)}"]`)?.focus();
  }

  item(run) {
    const choose = (event) => {
      this.chosen[event.target.checked ? "add" : "delete"](run.id);
      this.draw();
    };
    const box = h("input", { type: "checkbox", "data-run": run.id, checked: this.chosen.has(run.id), "aria-label": `Compare ${run.id}`, change: choose });
    const name = run.title ?? run.id;
    const about = [name !== run.id && run.id, run.loss, run.samplers && `${run.samplers} sampler${run.samplers === 1 ? "" : "s"}`].filter(Boolean).join(" · ");
    return h(
      "li.run", {}, box,
      h("div", {}, h("a.name", { href: `#/run/${encodeURIComponent(run.id)}/curves` }, name), h("div.soft.small", {}, about)),
      h("div.state", {}, pill(run.state)),
      h("div.progress-cell", {}, bar(run), h("span.small.soft", {}, `${number(run.step)} of ${number(run.steps)} steps`)),
      h("div.value", {}, h("span.unseen", {}, "reward "), number(run.reward)),
      h("div.spark-cell", {}, run.spark?.length > 1 && sparkline(run.spark, `reward from ${number(run.spark[0])} to ${number(run.spark.at(-1))}`)),
      h("div.value.lag", {}, h("span.unseen", {}, "lag "), number(run.lag)),
      h("div.last.soft.small", {}, ago(run.changed)),
      run.why && h("div.why.small.soft", {}, run.why),
    );
  }
}
