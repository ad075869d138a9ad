// Evaluations: every version by set.

import { h, number, percent } from "./dom.js";

export class EvaluationTab {
  constructor(ask, ids) {
    Object.assign(this, { ask, ids });
    this.element = h("div");
  }

  dispose() {}

  async show(runs) {
    await this.refresh(runs);
  }

  async refresh([run]) {
    const found = run.evaluations ?? [];
    const text = JSON.stringify(found);
    if (text === this.text) return;
    this.text = text;
    const labels = [...new Set(found.flatMap((one) => Object.keys(one.sets)))];
    if (!labels.length) {
      this.element.replaceChildren(h("div.card.empty", {}, h("h2", {}, "No evaluation yet"), h("p", {}, "Set ", h("code", {}, "evaluation.everySteps"), " and ", h("code", {}, "data.evals"), " to evaluate during the run.")));
      return;
    }
    this.element.replaceChildren(...labels.map((label) => this.set(label, found)));
  }

  set(label, found) {
    const rows = found.filter((one) => one.sets[label]);
    const best = Math.max(...rows.map((one) => one.sets[label].mean));
    const extra = Object.keys(rows[0].sets[label]).filter((key) => key.startsWith("pass@"));
    const heads = ["step", "mean@k", ...extra, "mean length", "truncated", "problems"];
    return h("section", { style: "margin-bottom:1.4rem" }, h("h2", {}, label), h("div.wide.card", {}, h(
      "table", {}, h("thead", {}, h("tr", {}, heads.map((words) => h("th.number", { scope: "col" }, words)))),
      h("tbody", {}, rows.map(({ step, sets: { [label]: values } }) => h("tr", {}, h("td.number", {}, number(step)),
        h("td.number", {}, values.mean === best ? h("b", {}, number(values.mean), " ", h("span.pill.succeeded", {}, "best")) : number(values.mean)),
        extra.map((key) => h("td.number", {}, number(values[key]))),
        h("td.number", {}, number(values["completions/mean_length"])), h("td.number", {}, percent(values["completions/clipped_ratio"])), h("td.number", {}, number(values.problems))))),
    )));
  }
}
