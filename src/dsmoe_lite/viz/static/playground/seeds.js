// The same two models trained with ten seeds, a few steps at a time so that the page stays alive.
(function (scope) {
  "use strict";

  const { make, drawDots, NAMES, GUESSES, count, percent, median, verdict, trainPair } = scope.dsmoePlayground;
  const SEEDS = 10;

  // Return what is left to see, or null if it was stopped. show(nodes): called with what is to be seen; isWanted(): whether to go on; colour(name): of a variable of the CSS.
  // steps: in all; changes: made on the way.
  async function trySeeds({ task, settings, changes, steps }, { show, isWanted, colour }) {
    const bar = make("progress", { max: SEEDS * steps, value: 0, "aria-label": "training of ten seeds" });
    const words = make("p");
    const dots = make("canvas", { className: "pg-dots", role: "img", "aria-label": "errors so far" });
    show([words, bar, dots]);
    const errors = [[], []];
    const draw = () => drawDots(dots, errors.map((list, i) => ({ name: NAMES[i], errors: list, color: colour(`--pg-${NAMES[i].toLowerCase()}`) })),
      { ink: colour("--pg-ink"), grid: colour("--pg-grid") });
    for (let seed = 1; seed <= SEEDS; seed += 1) {
      words.textContent = `Training both models ${SEEDS} times from step 0: seed ${seed} of ${SEEDS}.`;
      draw();
      for (const found of trainPair(task, settings, seed, steps, changes)) {
        if (typeof found === "number") bar.value = (seed - 1) * steps + found;
        else found.forEach((error, i) => errors[i].push(error));
        await new Promise((resolve) => setTimeout(resolve));
        if (!isWanted()) return null;
      }
    }
    const wins = GUESSES.map((one) => errors[0].filter((error, n) => verdict(error, errors[1][n]) === one).length);
    const same = changes.length ? ", each changed at the same step as above" : "";
    const found = `Of ${SEEDS} seeds${same}${same ? "," : ""} B paints better in ${wins[1]}, A in ${wins[0]}${wins[2] ? `, no clear difference in ${wins[2]}` : ""}. Unexplained at step ${count(steps)}, median: A ${percent(median(errors[0]))}, B ${percent(median(errors[1]))}. One dot per seed:`;
    words.textContent = found;
    dots.setAttribute("aria-label", found);
    draw();
    return [words, dots];
  }

  Object.assign(scope.dsmoePlayground, { trySeeds });
})(typeof globalThis === "undefined" ? self : globalThis);
