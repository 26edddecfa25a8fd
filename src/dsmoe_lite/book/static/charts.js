// Draw each chart of the page, in the page's light or dark colours; draw again when the reader changes them.
(function () {
  "use strict";
  const views = new Map(); // figure -> the view in it

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
    const controls = figure.querySelector(".chart-controls");
    if (before) before.finalize();
    controls.replaceChildren();
    const result = await window.vegaEmbed(figure.querySelector(".chart-drawing"), spec, {
      actions: false,
      bind: controls,
      mode: "vega-lite",
      renderer: "svg",
      tooltip: { theme: isDark() ? "dark" : "light" },
    });
    // the drawing around it is an image with a description; its parts have nothing to add
    figure.querySelector(".chart-drawing svg").setAttribute("aria-hidden", "true");
    views.set(figure, result);
    figure.dataset.drawn = isDark() ? "dark" : "light";
  }

  let queue = Promise.resolve();
  function drawAll() {
    for (const figure of document.querySelectorAll("figure.chart")) queue = queue.then(() => draw(figure));
  }

  document.addEventListener("DOMContentLoaded", () => {
    drawAll();
    let dark = isDark();
    new MutationObserver(() => {
      if (isDark() === dark) return;
      dark = isDark();
      drawAll();
    }).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  });
})();
