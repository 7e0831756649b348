// Reports whether the page is dark, and when that changes: by JupyterLab's and Voilà's attribute of
// the body, else by what the browser prefers.
function render({ model, el }) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  function report() {
    const light = document.body.dataset.jpThemeLight;
    const dark = light ? light === "false" : system.matches;
    if (dark !== model.get("dark")) {
      model.set("dark", dark);
      model.save_changes();
    }
  }
  el.hidden = true;
  const watcher = new MutationObserver(report);
  watcher.observe(document.body, { attributeFilter: ["data-jp-theme-light"] });
  system.addEventListener("change", report);
  report();
  return () => {
    watcher.disconnect();
    system.removeEventListener("change", report);
  };
}

export default { render };
