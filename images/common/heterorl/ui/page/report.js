// A report: runs on one page that is a file. What it shows lies in the element `answers`; see api.js.

import { ask } from "./api.js";
import { CurvesTab } from "./curves.js";
import { h, number } from "./dom.js";
import { tiles } from "./run.js";
import { SamplersTab } from "./samplers.js";
import { followTheme } from "./theme.js";

const STRIPS = 6; // runs whose samplers are drawn

async function show() {
  const report = await ask("report");
  const runs = await Promise.all(report.names.map((run) => ask("run", { run })));
  const curves = new CurvesTab(ask, report.names, "", { whole: true });
  const samplers = report.names.slice(0, STRIPS).map((name) => new SamplersTab(ask, [name]));
  followTheme(() => {});
  document.getElementById("main").replaceChildren(
    h("h1", {}, report.title), h("p.soft", { style: "margin:.2rem 0 1.2rem" }, report.about),
    runs.length > 1 ? compared(report.comparison) : h("div.tiles", { style: "margin-bottom:1.2rem" }, tiles(runs[0])),
    curves.element,
    section("Samplers", samplers.map((tab, i) => h("section", { "aria-label": report.names[i] }, runs.length > 1 && h("h3", { style: "margin:.8rem 0 .4rem" }, report.names[i]), tab.element))),
    section("Settings", table(report.settings, report.names)),
    section("In numbers", table(report.results, report.names)),
  );
  await curves.show(runs);
  await Promise.all(samplers.map((tab, i) => tab.show([runs[i]])));
}

function section(name, ...content) {
  return h("section", { "aria-label": name, style: "margin-top:2rem" }, h("h2", {}, name), ...content);
}

function table(rows, names) {
  const head = names.length > 1 && h("thead", {}, h("tr", {}, h("th", { scope: "col" }), names.map((name) => h("th", { scope: "col" }, name))));
  return h("div.wide.card", {}, h("table.facts", {}, head, h("tbody", {}, rows.map(({ name, cells }) =>
    h("tr", {}, h("th", { scope: "row" }, name), cells.map((words) => h("td", {}, words)))))));
}

/** Best, last and gap of each set, as in the paper's table. */
function compared({ sets, rows }) {
  if (!sets.length) return h("p.soft", {}, "No evaluation that all seeds have in common.");
  const measures = ["best", "last", "gap"];
  const some = rows.some((row) => row.seeds > 1);
  const words = ([mean, half]) => [h("b", {}, number(mean)), half !== null && h("span.soft", {}, ` ± ${number(half)}`)];
  return h("section", { "aria-label": "Evaluation", style: "margin-bottom:1.6rem" },
    h("div.wide.card", {}, h("table", {},
      h("thead", {},
        h("tr", {}, h("th", { scope: "col" }, "run"), h("th.number", { scope: "col" }, "seeds"), sets.map((set) => h("th", { scope: "colgroup", colspan: 3, style: "text-align:center" }, set))),
        h("tr", {}, h("th"), h("th"), sets.flatMap(() => measures.map((key) => h("th.number", { scope: "col" }, key))))),
      h("tbody", {}, rows.map((row) => h("tr", {}, h("td", {}, row.family), h("td.number", {}, row.seeds),
        sets.flatMap((set) => measures.map((key) => h("td.number.nowrap", {}, row.sets[set] ? words(row.sets[set][key]) : "–")))))))),
    h("p.faint.small", { style: "margin:.4rem 0 0" }, "Gap: best minus last. ", some && "Means over the seeds; ±: their 95 % interval by Student's t. ", "A single seed has no interval."));
}

show();
