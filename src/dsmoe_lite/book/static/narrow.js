// Charts on a phone: panels below each other, wrapped titles, and names of lines in a legend.
(function () {
  "use strict";
  const PADDING = 28; // of the card, left and right
  const MIN_FONT_SIZE = 9.5; // as in viz/theme.py
  const FONT = "Inter, 'Source Sans 3', system-ui, sans-serif"; // as in viz/theme.py
  const canvas = document.createElement("canvas").getContext("2d");

  function widthOf(text, font) {
    canvas.font = `${font} ${FONT}`;
    return canvas.measureText(text).width;
  }

  // `text` as lines of at most `room` px.
  function wrapped(text, font, room) {
    const lines = [];
    for (const part of [text].flat()) {
      let line = "";
      for (const word of String(part).split(" ")) {
        const longer = line ? `${line} ${word}` : word;
        if (line && widthOf(longer, font) > room) {
          lines.push(line);
          line = word;
        } else line = longer;
      }
      lines.push(line);
    }
    return lines;
  }

  // Sentences that were broken into lines for a wide page, whole again.
  const whole = (lines) => lines.reduce((sentences, line) => {
    const last = sentences.at(-1);
    return last && !/[.:?]$/.test(last) ? [...sentences.slice(0, -1), `${last} ${line}`] : [...sentences, line];
  }, []);

  function wrappedTitle(title, room) {
    if (title.text && title.text.expr) return title; // short, and known only once it is drawn
    if (typeof title === "string" || Array.isArray(title)) return wrapped(title, "600 15px", room);
    const result = { ...title, text: wrapped(title.text, `600 ${title.fontSize || 15}px`, room) };
    if (title.subtitle) result.subtitle = wrapped(whole([title.subtitle].flat()), "12.5px", room);
    return result;
  }

  const panelsOf = (node) => node.hconcat || node.concat || node.vconcat;
  const encodingsOf = (node) => [node.encoding || {}, ...(node.layer || []).flatMap(encodingsOf)];
  const styledAs = (style, layer) => layer.mark && layer.mark.style === style;

  // Panels that share the names at their left repeat them once they stand below each other.
  function nameRows(panels) {
    const named = panels.flatMap(encodingsOf).find(({ y }) => y && y.axis && y.axis.labels === true);
    for (const { y } of panels.flatMap(encodingsOf)) {
      if (named && y && y.axis && y.axis.labels === false) y.axis = named.y.axis;
    }
  }

  // Names at the ends of lines become a legend; names of horizontal levels move inside the panel.
  function moveNames(panel) {
    const names = panel.layer.find((layer) => styledAs("line_name", layer));
    const line = names && panel.layer.find(({ mark, encoding }) => mark.type === "line" && encoding.color);
    if (!line) return;
    const { field, scale } = line.encoding.color;
    const legend = { orient: "top", direction: "vertical", title: null, symbolType: "stroke", symbolSize: 300, labelLimit: 260 };
    for (const channel of ["color", "strokeDash"]) {
      if (line.encoding[channel]) line.encoding[channel].legend = legend;
    }
    panel.resolve = { scale: { color: "independent", strokeDash: "independent" } };
    const levels = names.encoding.color.scale.domain.filter((name) => !scale.domain.includes(name));
    if (levels.length) {
      names.transform = [...(names.transform || []), { filter: { field, oneOf: levels } }];
      Object.assign(names.mark, { align: "right", baseline: "bottom", dx: -4, dy: -3 });
    } else panel.layer.splice(panel.layer.indexOf(names), 1);
  }

  // Names left of the rows and numbers right of them move above each row, with a halo against lines behind them.
  function moveRows(panel, card) {
    const named = panel.layer.some((layer) => styledAs("row_name", layer));
    if (named) panel.height *= 1.9;
    panel.layer = panel.layer.filter((layer) => !styledAs("row_place", layer));
    const halo = { stroke: card, strokeWidth: 4, strokeJoin: "round" };
    for (const { mark, encoding } of panel.layer) {
      if (mark && mark.style === "row_name") {
        Object.assign(mark, { dy: -24, ...halo });
        encoding.x = { value: 0 };
      } else if (mark && mark.style === "row_text") {
        Object.assign(mark, { align: "right", dx: 0, dy: named ? -9 : -12, ...halo });
      }
    }
  }

  function rearrange(node, room, card) {
    if (node.title) node.title = wrappedTitle(node.title, room);
    for (const { legend } of encodingsOf(node).flatMap(({ color, shape }) => [color || {}, shape || {}])) {
      if (legend && (legend.orient === "bottom" || legend.orient === "top")) legend.columns = 2;
    }
    if (node.layer) {
      moveRows(node, card);
      node.layer = node.layer.filter((layer) => !styledAs("in_segment", layer)); // a segment has no room for words
      moveNames(node);
    }
    const panels = panelsOf(node);
    if (!panels) return;
    nameRows(panels);
    for (const arrangement of ["hconcat", "concat", "columns"]) delete node[arrangement];
    node.vconcat = panels;
    panels.forEach((panel) => rearrange(panel, room, card));
  }

  // The rows that a view or its layers hold themselves.
  const rowsOf = (node) => [...((node.data || {}).values || []), ...(node.layer || []).flatMap(rowsOf)];
  const valuesOf = (view, field) => new Set(rowsOf(view).map((row) => row[field]).filter((value) => value !== undefined));

  // Names of columns are turned, and numbers in cells smaller or gone, where a column is too narrow for them.
  function fitColumns(view) {
    const { x } = encodingsOf(view).find(({ x: found }) => found && found.field && found.type !== "quantitative") || {};
    if (!x || typeof view.width !== "number") return;
    const names = valuesOf(view, x.field);
    const step = view.width / names.size;
    const words = [...names].flatMap((name) => String(name).split("|"));
    for (const encoding of encodingsOf(view)) {
      const axis = encoding.x && encoding.x.field === x.field && encoding.x.axis;
      if (!axis || axis.labels === false || axis.values || !(Math.max(...words.map((word) => widthOf(word, "12px"))) > step - 4)) continue;
      const atTop = axis.orient === "top";
      Object.assign(axis, { labelAngle: -55, labelAlign: atTop ? "left" : "right", labelBaseline: "middle", labelOverlap: false });
      if (axis.labelExpr) axis.labelExpr = "trim(replace(datum.label, '|', ' '))";
    }
    if (!view.layer) return;
    view.layer = view.layer.filter((layer) => {
      if (!styledAs("in_cell", layer)) return true;
      const { field, format } = layer.encoding.text;
      const texts = format ? ["+0.00"] : [...valuesOf(view, field)];
      const widest = Math.max(...texts.map((text) => widthOf(String(text), "10px")));
      const size = Math.min(layer.mark.fontSize || 12, (10 * (step - 2)) / widest);
      layer.mark.fontSize = Math.max(size, MIN_FONT_SIZE);
      return size >= MIN_FONT_SIZE;
    });
  }

  // The views of a spec that have a width, each with its share of the widest one's.
  function sized(node) {
    const views = (panelsOf(node) || []).flatMap(sized);
    return node.width === undefined ? views : [...views, node];
  }

  function setWidth(view, width) {
    const before = view.width;
    if (typeof before !== "number") {
      view.width = { step: width / valuesOf(view, encodingsOf(view).find(({ x }) => x).x.field).size };
      return;
    }
    view.width = Math.round(width);
    for (const encoding of encodingsOf(view)) {
      for (const channel of Object.values(encoding)) {
        if (channel && channel.value === before) channel.value = view.width; // at the right edge
      }
      for (const titled of [encoding.x, (encoding.x || {}).axis]) {
        if (titled && titled.title) titled.title = wrapped([titled.title].flat().join(" "), "500 12px", view.width);
      }
    }
  }

  // Draw `spec` by `embed(spec)` in at most `room` px. What axes and names take beside the panels is known once it is drawn.
  window.dsmoeNarrow = async function (spec, room, embed) {
    rearrange(spec, room - PADDING, spec.config.background);
    spec.config = { ...spec.config, axisX: { labelOverlap: true, labelSeparation: 6, labelFlush: true } };
    const views = sized(spec);
    const widest = Math.max(...views.map(({ width }) => width).filter(Number.isFinite));
    const shares = views.map(({ width }) => (Number.isFinite(width) ? width / widest : 1));
    const plain = JSON.stringify(spec);
    for (let width = room - PADDING, attempt = 0; ; attempt += 1) {
      const trial = JSON.parse(plain);
      sized(trial).forEach((view, i) => {
        setWidth(view, width * shares[i]);
        fitColumns(view);
      });
      const drawn = await embed(trial);
      const excess = drawn.view.container().querySelector("svg").getAttribute("width") - room;
      if (excess <= 0 || attempt === 6) return drawn;
      drawn.finalize();
      width = Math.max(80, width - excess);
    }
  };
})();
