// Canvases of the playground: pictures, whose tile is whose, and the error over time.
(function (scope) {
  "use strict";

  const { PIXELS, prepare } = scope.dsmoePlayground;
  const SHADES = 256;
  const HIGHEST = 2.2; // a value of the picture that gets the last shade
  const HIGHEST_ERROR = 2;
  const RANGE = Math.log10(HIGHEST_ERROR / 0.001);
  const TICKS = [[1, "100%"], [0.1, "10%"], [0.01, "1%"], [0.001, "0.1%"]];
  const APART = 13; // px between two letters
  const [FONT, BOLD] = ["12px system-ui, sans-serif", "700 13px system-ui, sans-serif"];
  const STOPS = [[12, 45, 84], [88, 148, 196], [250, 250, 248], [240, 190, 70], [150, 84, 0]]; // from low to high

  const RAMP = Array.from({ length: SHADES }, (_, i) => {
    const at = (i / (SHADES - 1)) * (STOPS.length - 1);
    const from = Math.min(Math.floor(at), STOPS.length - 2);
    return STOPS[from].map((value, c) => value + (at - from) * (STOPS[from + 1][c] - value));
  });

  // A colour per expert: hues a golden angle apart, so that neighbours in number differ most.
  const colorOf = (e) => `oklch(${e % 2 ? 0.62 : 0.78} 0.14 ${(e * 137.5) % 360})`;

  function put(image, left, top, values) {
    for (let p = 0; p < values.length; p += 1) {
      const shade = Math.round(((values[p] / HIGHEST + 1) / 2) * (SHADES - 1));
      const [r, g, b] = RAMP[Math.min(SHADES - 1, Math.max(0, shade))];
      const x = left + (p % PIXELS);
      const y = top + Math.floor(p / PIXELS);
      image.data.set([r, g, b, 255], 4 * (y * image.width + x));
    }
  }

  // The form of a texture, whatever its gate.
  function drawTexture(canvas, values) {
    const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-6);
    drawTiles(canvas, [values.map((value) => (1.5 * value) / largest)], 1);
  }

  // pictures: of each tile (PIXELS^2), row after row; side: tiles in a row.
  function drawTiles(canvas, pictures, side) {
    const rows = Math.ceil(pictures.length / side);
    if (canvas.width !== side * PIXELS) [canvas.width, canvas.height] = [side * PIXELS, rows * PIXELS];
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    pictures.forEach((values, n) => put(image, (n % side) * PIXELS, Math.floor(n / side) * PIXELS, values));
    context.putImageData(image, 0, 0);
  }

  // Each tile in the colours of its experts, as wide as their gates; of `only` alone if it is a number. A band on top of
  // each tile: the shared experts. Hatched: the share of the tile's tokens that is dropped.
  function drawChoices(canvas, { tiles, droppedOf, shared }, side, only, { idle, gap, ink }) {
    const [context, size] = prepare(canvas, canvas.clientWidth || 200, canvas.clientWidth || 200);
    const cell = size / side;
    const pad = cell > 30 ? 1.5 : 0.75;
    const width = cell - 2 * pad;
    context.fillStyle = gap;
    context.fillRect(0, 0, size, size);
    tiles.forEach(({ ids, gates }, n) => {
      const sum = gates.reduce((a, b) => a + b, 0) || 1;
      const [x, y] = [(n % side) * cell + pad, Math.floor(n / side) * cell + pad];
      const band = shared ? width * 0.2 : 0;
      context.fillStyle = ink;
      context.fillRect(x, y, width, band);
      let left = x;
      ids.forEach((e, k) => {
        const share = (gates[k] / sum) * width;
        context.fillStyle = only === null || only === e ? colorOf(e) : idle;
        context.fillRect(left, y + band, share, width - band);
        left += share;
      });
      if (droppedOf[n] > 0.005) hatch(context, x, y + width * (1 - droppedOf[n]), width, width * droppedOf[n]);
      if (ids.length === 1 && cell >= 25) {
        context.fillStyle = only === null || only === ids[0] ? "#111" : gap;
        context.font = `600 ${cell / 3.4}px system-ui, sans-serif`;
        context.textAlign = "center";
        context.textBaseline = "middle";
        context.fillText(`e${ids[0]}`, x + width / 2, y + width / 2);
      }
    });
  }

  // White stripes over a rectangle.
  function hatch(context, x, y, width, height) {
    context.save();
    context.beginPath();
    context.rect(x, y, width, height);
    context.clip();
    context.strokeStyle = "#fff";
    context.lineWidth = 2.5;
    context.beginPath();
    for (let at = -height; at < width; at += 5) {
      context.moveTo(x + at, y + height);
      context.lineTo(x + at + height, y);
    }
    context.stroke();
    context.restore();
  }

  // The error of each model over the steps, on a log axis from 200% down to 0.1%; B's line is dashed, and a mark tells when
  // a setting was changed. lines: {name, points, color}; marks: {step, words}.
  function drawCurves(canvas, lines, { until, marks }, { ink, grid }) {
    const [context, width, height] = prepare(canvas, canvas.clientWidth || 260, canvas.clientHeight || 150);
    const [left, right, top, bottom] = [42, width - 20, 6, height - 20];
    const x = (step) => left + (step / until) * (right - left);
    const y = (error) => top + (Math.min(RANGE, Math.max(0, Math.log10(HIGHEST_ERROR / error))) / RANGE) * (bottom - top);
    context.font = FONT;
    context.textAlign = "right";
    for (const [error, label] of TICKS) {
      context.fillStyle = ink;
      context.fillText(label, left - 6, y(error) + 4);
      context.fillStyle = grid;
      context.fillRect(left, y(error), right - left, 1);
    }
    context.fillStyle = ink;
    context.fillText(`${until.toLocaleString("en")} steps`, right, height - 4);
    for (const { step, words } of marks) {
      context.fillRect(x(step), top, 1, bottom - top);
      context.textAlign = step < until / 2 ? "left" : "right";
      context.fillText(words, x(step) + (step < until / 2 ? 5 : -5), top + 12);
    }
    const ends = lines.map(({ points }) => y(points.at(-1).error));
    if (Math.abs(ends[0] - ends[1]) < APART) { // the letters keep off each other
      const [middle, sign] = [(ends[0] + ends[1]) / 2, ends[0] <= ends[1] ? 1 : -1];
      [ends[0], ends[1]] = [middle - (sign * APART) / 2, middle + (sign * APART) / 2];
    }
    lines.forEach(({ name, points, color }, i) => {
      context.strokeStyle = context.fillStyle = color;
      context.lineWidth = 2;
      context.setLineDash(i ? [5, 3] : []);
      context.beginPath();
      points.forEach(({ step, error }, n) => context[n ? "lineTo" : "moveTo"](x(step), y(error)));
      context.stroke();
      context.setLineDash([]);
      const { step, error } = points.at(-1);
      context.beginPath();
      context.arc(x(step), y(error), 3, 0, 2 * Math.PI);
      context[i ? "stroke" : "fill"]();
      context.textAlign = "left";
      context.font = BOLD;
      context.fillText(name, x(step) + 7, Math.max(12, ends[i] + 4));
    });
  }

  // A row of dots per model, one of each seed, on the same axis lying down. lines: {name, errors, color}.
  function drawDots(canvas, lines, { ink, grid }) {
    const [context, width, height] = prepare(canvas, canvas.clientWidth || 320, canvas.clientHeight || 90);
    const x = (error) => 30 + (1 - Math.min(RANGE, Math.max(0, Math.log10(HIGHEST_ERROR / error))) / RANGE) * (width - 60);
    context.font = FONT;
    context.textAlign = "center";
    for (const [error, label] of TICKS) {
      context.fillStyle = grid;
      context.fillRect(x(error), 4, 1, height - 24);
      context.fillStyle = ink;
      context.fillText(label, x(error), height - 5);
    }
    lines.forEach(({ name, errors, color }, row) => {
      const y = 18 + row * 26;
      context.fillStyle = color;
      context.font = BOLD;
      context.fillText(name, 10, y + 4);
      context.globalAlpha = 0.7;
      errors.forEach((error) => {
        context.beginPath();
        context.arc(x(error), y, 5, 0, 2 * Math.PI);
        context.fill();
      });
      context.globalAlpha = 1;
    });
  }

  Object.assign(scope.dsmoePlayground, { drawTiles, drawTexture, drawChoices, drawCurves, drawDots, colorOf });
})(typeof globalThis === "undefined" ? self : globalThis);
