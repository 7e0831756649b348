// A table whose rows are chosen by mouse or keyboard. Rows come sorted and filtered from Python:
// what is here draws them, keeps the focus, and reports the choice, the order and the width.
const PAGE = 10;
const WATCHED = ["rows", "columns", "selected", "sort"];

function render({ model, el }) {
  el.classList.add("runs-table");
  el.dataset.lmSuppressShortcuts = "true"; // JupyterLab leaves the arrow keys to the table
  const box = el.appendChild(document.createElement("div"));
  box.className = "rows";
  const table = box.appendChild(document.createElement("table"));
  table.setAttribute("role", "grid");
  table.setAttribute("aria-multiselectable", "true");
  table.setAttribute("aria-label", model.get("name"));
  const head = table.createTHead().insertRow();
  const body = table.createTBody();
  let current = null; // id of the row that the Tab key reaches
  let anchor = null; // id of the row from which Shift extends the choice

  const ids = () => model.get("rows").map((row) => row.id);
  const lines = () => [...body.rows];

  function choose(chosen) {
    model.set("selected", [...new Set(chosen)]);
    model.save_changes();
  }

  function toggle(id, extend) {
    const chosen = model.get("selected");
    if (extend && anchor !== null && ids().includes(anchor)) {
      const ends = [ids().indexOf(anchor), ids().indexOf(id)].sort((a, b) => a - b);
      choose([...chosen, ...ids().slice(ends[0], ends[1] + 1)]);
    } else {
      choose(chosen.includes(id) ? chosen.filter((one) => one !== id) : [...chosen, id]);
      anchor = id;
    }
  }

  function drawHead() {
    const [key, descending] = model.get("sort");
    const columns = model.get("columns");
    while (head.cells.length > columns.length) head.lastChild.remove();
    columns.forEach((column, i) => {
      let cell = head.cells[i];
      if (!cell) {
        cell = head.appendChild(document.createElement("th"));
        cell.appendChild(document.createElement("button"));
      }
      cell.className = column.number ? "number" : "";
      const here = column.key === key;
      cell.setAttribute("aria-sort", here ? (descending ? "descending" : "ascending") : "none");
      cell.firstChild.textContent = column.name + (here ? (descending ? " ▼" : " ▲") : "");
      cell.firstChild.setAttribute("aria-label", `sort by ${column.name}`);
      cell.firstChild.onclick = () => {
        const [sorted, down] = model.get("sort");
        model.set("sort", [column.key, column.key === sorted && !down]);
        model.save_changes();
      };
    });
  }

  function drawBody() {
    const rows = model.get("rows");
    const columns = model.get("columns");
    const focused = body.contains(document.activeElement);
    while (body.rows.length > rows.length) body.lastChild.remove();
    rows.forEach((row, i) => {
      const line = body.rows[i] || body.insertRow();
      line.dataset.id = row.id;
      line.title = row.title;
      line.className = row.trouble ? "trouble" : "";
      while (line.cells.length > columns.length) line.lastChild.remove();
      columns.forEach((column, j) => {
        const cell = line.cells[j] || line.insertCell();
        cell.className = column.number ? "number" : "";
        if (cell.textContent !== row.cells[j]) cell.textContent = row.cells[j];
      });
    });
    if (!ids().includes(current)) current = ids()[0] ?? null;
    mark();
    if (focused) lines().find((line) => line.dataset.id === current)?.focus();
  }

  function mark() {
    const chosen = new Set(model.get("selected"));
    for (const line of lines()) {
      line.setAttribute("aria-selected", String(chosen.has(line.dataset.id)));
      line.tabIndex = line.dataset.id === current ? 0 : -1;
    }
  }

  function go(index) {
    const line = lines()[Math.max(0, Math.min(index, body.rows.length - 1))];
    if (!line) return;
    current = line.dataset.id;
    mark();
    line.focus();
  }

  body.addEventListener("click", (event) => {
    const line = event.target.closest("tr");
    current = line.dataset.id;
    toggle(current, event.shiftKey);
    line.focus();
  });
  body.addEventListener("keydown", (event) => {
    const at = lines().findIndex((line) => line.dataset.id === current);
    const moves = {
      ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + PAGE, PageUp: at - PAGE,
      Home: 0, End: body.rows.length - 1,
    };
    if (event.key in moves) {
      if (event.shiftKey && anchor === null) anchor = current;
      go(moves[event.key]);
      if (event.shiftKey) toggle(current, true);
    } else if (event.key === " " || event.key === "Enter") {
      toggle(current, event.shiftKey);
    } else if (event.key === "a" && (event.ctrlKey || event.metaKey)) {
      choose([...model.get("selected"), ...ids()]);
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  });

  const draws = { rows: drawBody, columns: drawAll, selected: mark, sort: drawHead };
  function drawAll() {
    drawHead();
    drawBody();
  }
  for (const name of WATCHED) model.on(`change:${name}`, draws[name]);
  model.on("msg:custom", (message, buffers) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([buffers[0]], { type: message.type }));
    link.download = message.name;
    link.click();
    URL.revokeObjectURL(link.href);
  });
  const watcher = new ResizeObserver(() => {
    const width = Math.round(el.clientWidth);
    if (width > 0 && Math.abs(width - model.get("width")) > 20) {
      model.set("width", width);
      model.save_changes();
    }
  });
  watcher.observe(el);
  drawAll();
  return () => {
    watcher.disconnect();
    for (const name of WATCHED) model.off(`change:${name}`, draws[name]);
  };
}

export default { render };
