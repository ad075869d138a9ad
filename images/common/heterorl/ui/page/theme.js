// Light or dark: as the reader chose, else as the system is.

const system = matchMedia("(prefers-color-scheme: dark)");

/** Keep to the theme from now on; `changed` is called when it is another one. */
export function followTheme(changed) {
  const apply = () => {
    const chosen = stored() ?? (system.matches ? "dark" : "light");
    if (document.documentElement.dataset.theme === chosen) return;
    document.documentElement.dataset.theme = chosen;
    changed();
  };
  document.getElementById("theme")?.addEventListener("click", () => {
    localStorage.setItem("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    apply();
  });
  system.addEventListener("change", apply);
  apply();
}

/** A file may have no storage. */
function stored() {
  try {
    return localStorage.getItem("theme");
  } catch {
    return null;
  }
}
