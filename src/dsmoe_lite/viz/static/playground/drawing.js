// Canvases of the playground: pictures, whose tile is whose, and the error over time.
(function (scope) {
  "use strict";

  const { PIXELS } = scope.dsmoePlayground;
  const SHADES = 256;
  const HIGHEST = 2.2; // a value of the picture that gets the last shade
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

  // pictures: of each tile (PIXELS^2), row after row; side: tiles in a row.
  function drawTiles(canvas, pictures, side) {
    const rows = Math.ceil(pictures.length / side);
    if (canvas.width !== side * PIXELS) [canvas.width, canvas.height] = [side * PIXELS, rows * PIXELS];
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    pictures.forEach((values, n) => put(image, (n % side) * PIXELS, Math.floor(n / side) * PIXELS, values));
    context.putImageData(image, 0, 0);
  }

  // Each tile in the colours of its experts, as wide as their gates; of `only` alone if it is a number.
  function drawChoices(canvas, tiles, side, only, { idle, gap }) {
    const size = 320;
    [canvas.width, canvas.height] = [size, size];
    const context = canvas.getContext("2d");
    const cell = size / side;
    context.fillStyle = gap;
    context.fillRect(0, 0, size, size);
    tiles.forEach(({ ids, gates }, n) => {
      const sum = gates.reduce((a, b) => a + b, 0) || 1;
      const width = cell - 3;
      let left = (n % side) * cell + 1.5;
      ids.forEach((e, k) => {
        const share = (gates[k] / sum) * width;
        context.fillStyle = only === null || only === e ? colorOf(e) : idle;
        context.fillRect(left, Math.floor(n / side) * cell + 1.5, share, width);
        left += share;
      });
      if (ids.length === 1 && cell >= 40) {
        context.fillStyle = only === null || only === ids[0] ? "#111" : gap;
        context.font = `600 ${cell / 3.6}px system-ui, sans-serif`;
        context.textAlign = "center";
        context.textBaseline = "middle";
        context.fillText(`e${ids[0]}`, (n % side) * cell + cell / 2, Math.floor(n / side) * cell + cell / 2);
      }
    });
  }

  // Lines of [step, error] on a log axis from 100% down to 0.1%. lines: {name, points, color}.
  function drawCurves(canvas, lines, steps, { ink, grid }) {
    const density = scope.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth || 260, canvas.clientHeight || 170];
    [canvas.width, canvas.height] = [width * density, height * density];
    const context = canvas.getContext("2d");
    context.scale(density, density);
    context.font = "12px system-ui, sans-serif";
    const [left, right, top, bottom] = [42, width - 22, 8, height - 22];
    const x = (step) => left + (step / steps) * (right - left);
    const y = (error) => top + (Math.min(3, Math.max(0, -Math.log10(error))) / 3) * (bottom - top);
    for (const [error, label] of [[1, "100%"], [0.1, "10%"], [0.01, "1%"], [0.001, "0.1%"]]) {
      context.fillStyle = ink;
      context.textAlign = "right";
      context.fillText(label, left - 6, y(error) + 4);
      context.fillStyle = grid;
      context.fillRect(left, y(error), right - left, 1);
    }
    context.fillStyle = ink;
    context.textAlign = "right";
    context.fillText(`${steps.toLocaleString("en")} steps`, right, height - 5);
    for (const { name, points, color } of lines) {
      if (!points.length) continue;
      context.strokeStyle = color;
      context.lineWidth = 2;
      context.beginPath();
      points.forEach(([step, error], n) => context[n ? "lineTo" : "moveTo"](x(step), y(error)));
      context.stroke();
      const [step, error] = points.at(-1);
      context.fillStyle = color;
      context.textAlign = "left";
      context.font = "700 13px system-ui, sans-serif";
      context.fillText(name, x(step) + 5, y(error) + 4);
    }
  }

  // A row of dots per model, one of each seed, on the same axis lying down. lines: {name, errors, color}.
  function drawDots(canvas, lines, { ink, grid }) {
    const density = scope.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth || 320, canvas.clientHeight || 90];
    [canvas.width, canvas.height] = [width * density, height * density];
    const context = canvas.getContext("2d");
    context.scale(density, density);
    const x = (error) => 30 + (1 - Math.min(3, Math.max(0, -Math.log10(error))) / 3) * (width - 60);
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "center";
    for (const [error, label] of [[0.001, "0.1%"], [0.01, "1%"], [0.1, "10%"], [1, "100%"]]) {
      context.fillStyle = grid;
      context.fillRect(x(error), 4, 1, height - 24);
      context.fillStyle = ink;
      context.fillText(label, x(error), height - 5);
    }
    lines.forEach(({ name, errors, color }, row) => {
      const y = 20 + row * 28;
      context.fillStyle = color;
      context.font = "700 13px system-ui, sans-serif";
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

  Object.assign(scope.dsmoePlayground, { drawTiles, drawChoices, drawCurves, drawDots, colorOf });
})(typeof globalThis === "undefined" ? self : globalThis);
