// What a run shows, in words and numbers: who paints better, what a change cost, how many experts work.
(function (scope) {
  "use strict";

  const SAME = 1.25; // errors within this factor are no clear difference
  const LAST = 8; // points of the curve, 200 steps: an end on a spike is judged by their median as well
  const SPIKE = 1.5; // times that median
  const NAMES = ["A", "B"];
  const GUESSES = ["A paints better", "B paints better", "No clear difference"];

  const count = (n) => n.toLocaleString("en");
  const percent = (error) => `${error >= 0.0995 ? Math.round(100 * error) : (100 * error).toFixed(1)}%`;
  const median = (values) => {
    const sorted = [...values].sort((a, b) => a - b);
    const middle = sorted.length / 2;
    return (sorted[Math.floor(middle)] + sorted[Math.ceil(middle - 1)]) / 2;
  };
  const plural = (n, one) => `${n} ${one}${n === 1 ? "" : "s"}`;

  // The words that compare two errors. Numbers that print alike name no winner.
  function verdict(a, b) {
    if (percent(a) === percent(b) || Math.max(a, b) / Math.min(a, b) < SAME) return GUESSES[2];
    return GUESSES[a < b ? 0 : 1];
  }

  // How a run ends: the verdict, on which the last point and the median of the last 200 steps must agree, and both errors.
  function endOf({ points }) {
    const last = points.map((list) => list.at(-1).error);
    const usual = points.map((list) => median(list.slice(-LAST).map(({ error }) => error)));
    const agree = verdict(...last) === verdict(...usual);
    const isSteady = agree && last.every((error, i) => error < SPIKE * usual[i] || percent(error) === percent(usual[i]));
    const [steps] = points.map((list) => count(list.at(-1).step));
    const pair = (errors) => errors.map(percent);
    const [[a, b], [usualA, usualB]] = [pair(last), pair(usual)];
    const words = isSteady
      ? `At step ${steps} A leaves ${a} of the picture unexplained, B ${b}.`
      : `Over the last 200 steps A leaves ${usualA} of the picture unexplained, B ${usualB} (medians); at step ${steps}, ${a} and ${b}.`;
    return { verdict: agree ? verdict(...last) : GUESSES[2], words };
  }

  // Why a curve jumps up, if tiles changed hands at every jump.
  function spikeWords({ points }) {
    return points.flatMap((list, i) => {
      const jumps = list.filter(({ error }, n) => n && error > SPIKE * list[n - 1].error);
      if (!jumps.length || !jumps.every(({ moved: n }) => n)) return [];
      const times = jumps.length === 1 ? "once, when a tile" : `${jumps.length === 2 ? "twice" : `${jumps.length} times`}, each time when a tile`;
      return [`${NAMES[i]}'s curve jumps up (by more than half within 25 steps) ${times} went to an expert that had not learnt it.`];
    });
  }

  // Tiles that changed hands in the last 200 steps, looked at every 25.
  const moved = (points) => points.slice(-LAST).reduce((sum, { moved: n }) => sum + n, 0);

  // How the work is spread. An expert that paints no tile is idle; if a quarter were idle for 200 steps, it is a collapse.
  function crowd({ loads, awake, step }) {
    const all = loads.length;
    const working = Array.from(loads).filter((load) => load > 0).length;
    return { all, working, isCollapsed: step >= 200 && awake <= 0.75 * all, busiest: Math.max(...loads) };
  }

  // isWhole: no expert is switched off.
  function crowdWords(view, hasLimit, isWhole) {
    const { all, working, isCollapsed, busiest } = crowd(view);
    const who = isCollapsed && isWhole ? `Collapsed: ${working} of ${all} experts do all the work` : working === all ? `All ${all} experts work` : `${working} of ${all} experts work`;
    return `${who}; the busiest does ${busiest.toFixed(1)} times an equal share${hasLimit ? `; ${Math.round(100 * view.dropped)}% of the tokens are dropped` : ""}.`;
  }

  // What a change at step `at` did to the error of a model: how far it rose first, and when it was below its old value.
  function costWords(name, points, at) {
    const before = points.find(({ step }) => step === at);
    const after = points.filter(({ step }) => step > at);
    if (!before || !after.length) return "";
    const back = after.find(({ error }) => error < before.error);
    const first = back ? after.slice(0, after.indexOf(back)) : after;
    const peak = first.reduce((most, point) => (point.error > most.error ? point : most), before);
    const rose = peak.error > 1.05 * before.error && percent(peak.error) !== percent(before.error);
    const start = `${name} left ${percent(before.error)} unexplained at step ${count(at)}`;
    if (!back) return `The cost: ${start} and was not below that again; at worst ${percent(peak.error)}.`;
    if (!rose) return `${start}; after the change its error fell at once.`;
    return `The cost: ${start}, rose to ${percent(peak.error)} at step ${count(peak.step)}, and was below its old error again from step ${count(back.step)}.`;
  }

  // What the record says, and where this seed is among its ten.
  function recordWords(found, seed) {
    const range = (errors) => `${percent(median(errors))} (${percent(Math.min(...errors))} to ${percent(Math.max(...errors))})`;
    const wins = GUESSES.map((words) => found.a.filter((error, n) => verdict(error, found.b[n]) === words).length);
    const lines = [`Ten recorded seeds, median error at step ${count(found.steps)} (lowest to highest): A ${range(found.a)}, B ${range(found.b)}. B painted better in ${wins[1]}, A in ${wins[0]}${wins[2] ? `, no clear difference in ${wins[2]}` : ""}.`];
    const gaps = found.a.map((error, n) => Math.log(error / found.b[n]));
    const side = median(gaps) < 0 ? -1 : 1;
    const own = side * gaps[seed - 1];
    if (seed > gaps.length) lines.push(`Seed ${seed} is not one of them (1 to ${gaps.length}).`);
    else if (Math.max(wins[0], wins[1]) >= 0.8 * gaps.length) { // there is a gap to speak of
      const place = gaps.filter((gap) => side * gap > own).length; // seeds with a larger one
      const rank = place === 0 ? "largest" : place === gaps.length - 1 ? "smallest" : `${place + 1}${["th", "st", "nd", "rd"][place + 1] ?? "th"} largest`;
      lines.push(`Of these ten, seed ${seed} has the ${rank} gap between A and B${place === gaps.length - 1 ? ": other seeds show more" : place === 0 ? ": other seeds show less" : ""}.`);
    } else lines.push("Who wins depends on the seed here: one run decides nothing.");
    return lines;
  }

  Object.assign(scope.dsmoePlayground, {
    NAMES, GUESSES, count, percent, median, plural, verdict, endOf, spikeWords, moved, crowd, crowdWords, costWords, recordWords,
  });
})(typeof globalThis === "undefined" ? self : globalThis);
