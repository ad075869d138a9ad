// Evaluations: every version by set; below, what was answered to each problem, and one problem over the versions.

import { h, number, percent, speak } from "./dom.js";

const SIZE = 25;
const OUTCOMES = { right: "right", partly: "partly right", wrong: "wrong", gained: "better than at first", lost: "worse than at first" };

export class EvaluationTab {
  constructor(ask, ids, root) {
    Object.assign(this, { ask, root });
    this.id = ids[0];
    this.page = 0;
    this.outcome = "";
    this.element = h("div");
    this.tables = h("div");
    const changed = () => this.find().catch(() => {});
    this.set = h("select", { change: () => { this.step.value = ""; changed(); } });
    this.step = h("select", { change: changed });
    this.words = h("input", { type: "search", placeholder: "words of the problem", input: changed });
    this.outcomes = h("div.outcomes", { role: "group", "aria-label": "How it was answered" });
    this.found = h("p.soft.small", { role: "status", style: "margin:0 0 .6rem" });
    this.list = h("ol.problems", { "aria-label": "Problems" });
    this.pager = h("div.pager");
    this.setField = h("label", {}, "Evaluation set", this.set);
    this.answers = h("section", { "aria-label": "Answers by problem", hidden: true },
      h("h2", {}, "Answers by problem"),
      h("div.browse", {},
        h("form.filters.card", { "aria-label": "Filters", submit: (event) => event.preventDefault() },
          this.setField, h("label", {}, "Weights of step", this.step), h("div.soft.small", {}, "Answered", this.outcomes), h("label", {}, "Find", this.words)),
        h("div", {}, this.found, h("div.card", {}, this.list, this.pager))));
    this.keys = (event) => {
      if (event.key === "Escape" && this.row) location.hash = `${this.root}/evaluation`;
    };
    document.addEventListener("keydown", this.keys);
  }

  dispose() {
    document.removeEventListener("keydown", this.keys);
  }

  async show(runs, [label, row] = []) {
    this.row = row;
    if (row !== undefined) return this.open(label, row);
    this.element.replaceChildren(this.tables, this.answers);
    await this.refresh(runs);
  }

  async refresh([run]) {
    if (this.row !== undefined) return;
    this.drawVersions(run.evaluations ?? []);
    if (!this.answers.contains(document.activeElement)) await this.find(this.page);
  }

  drawVersions(found) {
    const text = JSON.stringify(found);
    if (text === this.versionsText) return;
    this.versionsText = text;
    const labels = [...new Set(found.flatMap((one) => Object.keys(one.sets)))];
    this.tables.replaceChildren(...labels.map((name) => versions(name, found)));
    if (!labels.length) this.tables.replaceChildren(h("div.card.empty", {}, h("h2", {}, "No evaluation yet"), h("p", {}, "Set ", h("code", {}, "evaluation.everySteps"), " and ", h("code", {}, "data.evals"), " to evaluate during the run.")));
  }

  // ── problems ──────────────────────────────────────────────────────────────────────────────────────────────────────
  async find(page = 0) {
    this.page = page; // at once, or a refresh would ask for the page before and replace this question
    const asked = { run: this.id, set: this.set.value, step: this.step.value, outcome: this.outcome, words: this.words.value, page, size: SIZE };
    const answer = await this.ask("answers", asked, { replaces: "answers" });
    const text = JSON.stringify([answer, page, this.outcome]);
    if (text === this.text) return;
    Object.assign(this, { answer, text });
    this.draw();
  }

  draw() {
    const { sets, steps, step, counts, problems, found, damaged } = this.answer;
    this.answers.hidden = !sets.length;
    choices(this.set, sets.map((name) => [name, name]), this.answer.set);
    choices(this.step, [...steps].reverse().map((at) => [at, number(at)]), step);
    this.setField.hidden = sets.length < 2;
    const pick = (outcome, words) => h("button", { type: "button", "aria-pressed": String(this.outcome === outcome), click: () => { this.outcome = outcome; this.find(); } }, h("span", {}, words), h("b", {}, number(counts[outcome || "all"])));
    this.outcomes.replaceChildren(pick("", "all"), ...Object.entries(OUTCOMES).map(([outcome, words]) => pick(outcome, words)));
    this.found.textContent = `${number(found)} problem${found === 1 ? "" : "s"}${steps.length > 1 ? `; squares: every evaluation from step ${number(steps[0])} to ${number(steps.at(-1))}` : ""}` + (damaged ? `; ${damaged} damaged line${damaged === 1 ? " was" : "s were"} left out` : "");
    this.list.replaceChildren(...problems.map((problem) => this.item(problem, steps, step)));
    if (!found) this.list.replaceChildren(h("li.empty", {}, "No problem matches these filters."));
    const pages = Math.max(1, Math.ceil(found / SIZE));
    this.pager.replaceChildren(
      h("button", { type: "button", disabled: this.page === 0, click: () => this.find(this.page - 1) }, "Previous"),
      h("span.soft.small", {}, `page ${number(this.page + 1)} of ${number(pages)}`),
      h("button", { type: "button", disabled: this.page + 1 >= pages, click: () => this.find(this.page + 1) }, "Next"),
    );
  }

  item(problem, steps, step) {
    const now = problem.right[steps.indexOf(step)];
    const place = [this.answer.set, problem.row].map(encodeURIComponent).join("/");
    return h("li", {}, h(
      "a", { href: `${this.root}/evaluation/${place}`, "aria-label": `${percent(now)} right: ${problem.prompt}` },
      h("span.prompt.mono", {}, problem.prompt), h("span.dots", {}, problem.right.slice(-40).map((share, i) => h("i", { style: `background:${shareColour(share)}`, title: `step ${steps.slice(-40)[i]}: ${percent(share)} right` }))),
      h("b.number", { style: "text-align:right" }, percent(now)),
    ));
  }

  // ── a problem ─────────────────────────────────────────────────────────────────────────────────────────────────────
  async open(label, row) {
    const problem = await this.ask("problem", { run: this.id, set: label, row }, { replaces: "problem" });
    const box = (name, words) => h("section.text.card", { "aria-label": name }, h("div.label", {}, name), h("pre", { tabindex: 0 }, words));
    this.element.replaceChildren(
      h("div.group-head", {},
        h("div.row", {}, h("a.button", { href: `${this.root}/evaluation` }, "← All problems"), h("b", {}, label), h("span.soft.small", {}, `problem ${row}`)),
        h("div.texts", {}, box("Prompt", problem.prompt), box("Reference", problem.reference))),
      ...problem.answers.map((answer) => h("section", { "aria-label": `Step ${answer.step}`, style: "margin-bottom:1rem" },
        h("h2", {}, `Step ${number(answer.step)}`, h("span.soft.small", { style: "font-weight:400" }, ` · ${percent(answer.right)} right`)),
        h("div.side", {}, answer.completions.map(completion)))),
      h("p.faint.small", {}, "Esc: all problems."),
    );
    speak(`Problem ${row} of ${label}`);
  }
}

function completion(one, i) {
  return h(
    "article.completion.card", { "aria-label": `Completion ${i + 1}, ${one.correct ? "right" : "wrong"}`, style: `border-top-color:${shareColour(one.correct ? 1 : 0)}` },
    h("div.chips", {}, h(one.correct ? "span.chip.good" : "span.chip", {}, one.correct ? "✓ right" : "✗ wrong"), h("span.chip", {}, `${one.tokens} token${one.tokens === 1 ? "" : "s"}`), one.truncated && h("span.chip.cut", {}, "truncated")),
    h("pre", { tabindex: 0, "aria-label": `Text of completion ${i + 1}` }, one.text),
  );
}

function versions(label, found) {
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

function choices(select, pairs, chosen) {
  const text = JSON.stringify(pairs);
  if (select.dataset.shown !== text) {
    select.dataset.shown = text;
    select.replaceChildren(...pairs.map(([value, words]) => h("option", { value }, words)));
  }
  select.value = chosen;
}

/** From faint (wrong) to green (right); of what was not evaluated, nothing. */
function shareColour(share) {
  return share === null ? "transparent" : `color-mix(in srgb, var(--c2) ${Math.round(share * 100)}%, var(--line))`;
}
