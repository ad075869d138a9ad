// What the page asks the server. A report, which is a file, carries the answers with it.

const carried = document.getElementById("answers");
const held = carried && JSON.parse(carried.textContent);
let trouble = "";
const pending = new Map();

/** The answer to an address below /api/; parameters that are null are left out, lists are repeated. */
export async function ask(what, parameters = {}, { replaces = null } = {}) {
  if (held) return fromReport(what, parameters);
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(parameters)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "") query.append(key, one);
    }
  }
  const controller = new AbortController();
  if (replaces) {
    pending.get(replaces)?.abort();
    pending.set(replaces, controller);
  }
  try {
    const response = await fetch(`/api/${what}?${query}`, { signal: controller.signal });
    tell("");
    if (!response.ok) throw new Error((await response.text()) || response.statusText);
    return await response.json();
  } catch (error) {
    if (error instanceof TypeError) tell("no connection to heterorl ui");
    throw error;
  }
}

/** Curves come whole, for the chart to cut; of the rest there is one answer a run. */
function fromReport(what, { run, key, x }) {
  if (what === "curves") return Object.fromEntries(key.map((one) => [one, held.curves[x][one]]));
  return what === "report" ? held.report : held[what][run];
}

function tell(words) {
  if (words === trouble) return;
  trouble = words;
  document.getElementById("connection").textContent = words;
}
