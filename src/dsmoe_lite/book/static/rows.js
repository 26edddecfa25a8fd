// The numbers of a chart as tables: what a pointer finds mark by mark, for those who use none.
(function () {
  "use strict";

  // What the marks of a drawing say to a pointer, in the order of drawing. Dots on a line repeat the line: once is enough.
  function said(view) {
    const rows = [];
    const known = new Set();
    const visit = (node) => {
      const found = (node.items || []).map((item) => item.tooltip).filter((row) => row && typeof row === "object");
      if (found.some((row) => !known.has(JSON.stringify(row)))) rows.push(...found);
      found.forEach((row) => known.add(JSON.stringify(row)));
      (node.items || []).forEach(visit);
    };
    visit(view.scenegraph().root);
    return rows;
  }

  function element(name, parent, text) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  }

  // One table for all rows that have the same columns.
  function table(columns, rows, parent) {
    const made = element("table", parent);
    const head = element("tr", element("thead", made));
    for (const column of columns) element("th", head, column).scope = "col";
    const body = element("tbody", made);
    for (const row of rows) {
      const line = element("tr", body);
      for (const column of columns) element("td", line, row[column]);
    }
  }

  // Fill the figure's <details> from the drawing in it; hide it where no mark says anything.
  window.dsmoeRows = function (figure, view) {
    const details = figure.querySelector(".chart-rows");
    const box = details.querySelector("div");
    const rows = said(view);
    details.hidden = rows.length === 0;
    const fill = () => {
      box.replaceChildren();
      if (!details.open) return;
      const groups = Map.groupBy(said(view), (row) => Object.keys(row).join("\n"));
      for (const group of groups.values()) table(Object.keys(group[0]), group, box);
    };
    details.ontoggle = fill;
    figure.oninput = () => setTimeout(fill, 100); // a control changed what is drawn
    fill();
  };
})();
