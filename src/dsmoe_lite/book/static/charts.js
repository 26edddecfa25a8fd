// Draw each chart of the page, in the page's light or dark colours; draw again when the reader changes them.
(function () {
  "use strict";
  const NARROW = 560; // px: with less room a chart takes its form for phones
  const views = new Map(); // figure -> the view in it, and the room it was drawn for

  const isDark = () => document.documentElement.dataset.theme === "dark";

  // The spec in dark colours: every light colour of the theme stands for a role, which has a dark one.
  function themed(text) {
    if (!isDark()) return text;
    return text.replace(/#[0-9A-Fa-f]{6}\b/g, (colour) => window.dsmoeDark[colour.toUpperCase()] || colour);
  }

  async function draw(figure) {
    const spec = JSON.parse(themed(figure.querySelector("script").textContent));
    const before = views.get(figure);
    for (const param of spec.params || []) {
      if (before && param.bind && "value" in param) param.value = before.view.signal(param.name);
    }
    delete spec.$schema; // it names Vega-Lite 5 for JupyterLab; the book's own is newer and reads it too
    if (before) before.finalize();
    const room = roomFor(figure);
    const result = await (room < NARROW ? window.dsmoeNarrow(spec, room, embedIn(figure)) : embedIn(figure)(spec));
    // the drawing around it is an image with a description; its parts have nothing to add
    figure.querySelector(".chart-drawing svg").setAttribute("aria-hidden", "true");
    views.set(figure, { ...result, room });
    window.dsmoeRows(figure, result.view);
    figure.dataset.drawn = isDark() ? "dark" : "light";
  }

  const embedIn = (figure) => (spec) => {
    const controls = figure.querySelector(".chart-controls");
    controls.replaceChildren();
    return window.vegaEmbed(figure.querySelector(".chart-drawing"), spec, {
      actions: false,
      bind: controls,
      mode: "vega-lite",
      renderer: "svg",
      tooltip: { theme: isDark() ? "dark" : "light" },
    });
  };

  const roomFor = (figure) => figure.parentElement.clientWidth - 2; // its border

  let queue = Promise.resolve();
  function drawAll() {
    for (const figure of document.querySelectorAll("figure.chart")) queue = queue.then(() => draw(figure));
  }

  // A turned phone or a dragged window: draw again the charts whose form or room changes.
  function drawResized() {
    for (const [figure, { room }] of views) {
      const now = roomFor(figure);
      if (now !== room && Math.min(now, room) < NARROW) queue = queue.then(() => draw(figure));
    }
  }

  document.addEventListener("DOMContentLoaded", () => {
    drawAll();
    let timer;
    window.addEventListener("resize", () => {
      clearTimeout(timer);
      timer = setTimeout(drawResized, 200);
    });
    let dark = isDark();
    new MutationObserver(() => {
      if (isDark() === dark) return;
      dark = isDark();
      drawAll();
    }).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  });
})();
