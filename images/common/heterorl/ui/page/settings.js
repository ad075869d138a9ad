// The manifest, field by field: what differs from the defaults, or between the runs.

import { h } from "./dom.js";

export class SettingsTab {
  constructor(ask, ids) {
    Object.assign(this, { ask, ids });
    this.onlyDiffering = true;
    this.search = h("input", { type: "search", placeholder: "Find a field", "aria-label": "Find a field", input: () => this.draw() });
    const words = ids.length > 1 ? "Only what differs between the runs" : "Only what differs from the defaults";
    this.box = h("input", { type: "checkbox", checked: true, change: (event) => { this.onlyDiffering = event.target.checked; this.draw(); } });
    this.table = h("div.wide.card");
    this.element = h("div", {}, h("div.tools", {}, this.search, h("label", {}, this.box, words)), this.table);
  }

  dispose() {}

  async show() {
    this.answer = await this.ask("settings", { run: this.ids });
    this.draw();
  }

  async refresh() {}

  rows() {
    const found = new Map();
    this.ids.forEach((id, i) => {
      for (const row of this.answer[id] ?? []) {
        if (!found.has(row.path)) found.set(row.path, { ...row, values: Array(this.ids.length).fill(undefined) });
        found.get(row.path).values[i] = row.value;
        found.get(row.path).differs ||= row.differs;
      }
    });
    return [...found.values()];
  }

  draw() {
    const words = this.search.value.trim().toLowerCase();
    const several = this.ids.length > 1;
    const unlike = (row) => several ? new Set(row.values.map((value) => JSON.stringify(value))).size > 1 : row.differs;
    const rows = this.rows().filter((row) => (!this.onlyDiffering || unlike(row)) && `${row.path} ${row.meaning}`.toLowerCase().includes(words));
    const heads = several ? ["field", ...this.ids] : ["field", "value", "default"];
    const cell = (row, value) => h(row.differs && !several ? "td.mono.differs" : "td.mono", {}, shown(value));
    this.table.replaceChildren(h(
      "table.settings", {}, h("thead", {}, h("tr", {}, heads.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, h("td", {}, h("div.mono", {}, row.path), h("div.meaning", {}, row.meaning)),
        row.values.map((value) => cell(row, value)), !several && h("td.mono.faint", {}, row.required ? "required" : shown(row.default))))),
    ));
    if (!rows.length) this.table.replaceChildren(h("p.empty", {}, this.onlyDiffering && !words ? "Nothing differs." : "No field matches."));
  }
}

function shown(value) {
  if (value === undefined || value === null) return "–";
  return typeof value === "string" ? value : JSON.stringify(value);
}
