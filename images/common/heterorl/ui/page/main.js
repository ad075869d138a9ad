// The page: its addresses (after the #), and following what goes on.
//
//   #/                          all runs
//   #/run/ID/TAB                one run: curves, samplers, completions, evaluation, settings
//   #/run/ID/completions/N      a group of completions
//   #/run/ID/evaluation/SET/ROW a problem of an evaluation set
//   #/compare/ID,ID,.../TAB     several runs: curves, settings

import { ask } from "./api.js";
import { h } from "./dom.js";
import { RunPage } from "./run.js";
import { RunsPage } from "./runs.js";
import { followTheme } from "./theme.js";

const EVERY_MS = 2000;
const main = document.getElementById("main");
let page = null;
let shown = null;
let busy = 0;

function parse() {
  const [kind, ids, tab, ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  if (kind === "run" || kind === "compare") {
    return { key: `${kind}/${ids}`, ids: ids.split(",").map(decodeURIComponent), tab: tab || "curves", rest: rest.map(decodeURIComponent) };
  }
  return { key: "runs" };
}

async function route() {
  const place = parse();
  if (shown !== place.key) {
    page?.dispose();
    page = place.key === "runs" ? new RunsPage(ask) : new RunPage(ask, place.ids);
    shown = place.key;
    main.replaceChildren(page.element);
    window.scrollTo(0, 0);
  }
  const crumbs = document.getElementById("crumbs");
  crumbs.replaceChildren(...(place.ids ? [place.ids.length > 1 ? `${place.ids.length} runs compared` : place.ids[0]] : []));
  document.title = place.ids ? `${place.ids.join(", ")} · HeteroRL` : "Runs · HeteroRL";
  await attempt(() => page.show(place));
}

async function attempt(work) {
  busy++;
  try {
    await work();
    document.getElementById("failure")?.remove();
  } catch (error) {
    report(error);
  } finally {
    busy--;
  }
}

/** Show what failed. A question that another one replaced has not, and a lost connection is shown by `ask`. */
function report(error) {
  if (error.name === "AbortError" || (error instanceof TypeError && error.message.includes("fetch"))) return;
  document.getElementById("failure")?.remove();
  main.prepend(h("p.notice.bad", { id: "failure", role: "alert" }, error.message));
}

window.addEventListener("unhandledrejection", (event) => {
  event.preventDefault();
  report(event.reason);
});

async function follow() {
  if (!document.hidden && page && !busy) await attempt(() => page.refresh());
  setTimeout(follow, EVERY_MS);
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
followTheme(() => page?.themed?.());
window.addEventListener("hashchange", route);
route().then(() => setTimeout(follow, EVERY_MS));
