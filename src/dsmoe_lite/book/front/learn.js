// The film of the front page: two smaller models in the course of their training, from numbers computed with the book.
(function (page) {
  "use strict";

  const { steps, n_facts: nFacts, questions, models } = window.dsmoeFront.learning;
  const { make, percent, list, shade } = page;
  const box = document.getElementById("learning");
  const PAUSE = 1100; // ms per snapshot when the film plays
  const stepName = (at) => steps[at].toLocaleString("en");
  let playing = null;

  // At which moments so far the answer was right, in a sentence that is true whatever they were.
  function history(answers, question, now) {
    const right = answers.flatMap((all, at) => (all[question].right && at <= now ? [at] : []));
    const atEnd = now === answers.length - 1;
    if (right.length === 0) return atEnd ? "It was right at none of these moments." : "Not right so far.";
    const names = `right at ${right.length === 1 ? "step" : "steps"} ${list(right.map(stepName))}`;
    if (!atEnd) return `So far ${names}.`;
    return `It was ${names}${right.includes(now) ? "" : "; wrong in the end"}.`;
  }

  function panelOf({ name, n_experts: E, n_shared: shared, known, answers }) {
    const says = make("p", { className: "says" });
    const when = make("p", { className: "when" });
    const count = make("b");
    const bar = make("i");
    const settled = make("p", { className: "settled" });
    const kind = E <= 16 ? "large" : "small";
    const grids = answers[0][0].used.map((_, layer) => {
      const squares = Array.from({ length: shared + E }, (_, n) => make("span", { className: n < shared ? "shared" : "" }));
      const node = make("div", { className: `experts ${kind}`, role: "img" }, ...squares);
      return { node, squares, label: make("div", { className: "layer-name" }, `layer ${layer}`) };
    });
    const heading = make("h3", {}, name, make("small", {}, `a smaller one; ends with ${known.at(-1)} of ${nFacts} facts`));
    const node = make("section", { className: `panel ${name.toLowerCase()}`, "aria-label": `${name} in training` },
      heading, says, when, ...grids.flatMap(({ node: grid, label }) => [label, grid]), settled,
      make("div", { className: "known" }, "knows ", count, ` of ${nFacts} facts`, make("div", { className: "track" }, bar)));

    function draw(at, question) {
      const { says: said, p, right, word, p_right: ofRight, used } = answers[at][question];
      const final = answers.at(-1)[question].used;
      const truth = right ? " ✓" : `; the right answer, ${word}, gets ${percent(ofRight)}`;
      says.replaceChildren("says ", make("b", {}, said), ` (${percent(p)})${truth}`);
      when.textContent = history(answers, question, at);
      let same = 0;
      grids.forEach(({ node: grid, squares }, layer) => {
        const gates = new Map(used[layer]);
        const last = new Set(final[layer].map(([e]) => e));
        same += used[layer].filter(([e]) => last.has(e)).length;
        squares.forEach((square, n) => shade(square, gates.get(n - shared) ?? 0, Math.max(...gates.values())));
        grid.setAttribute("aria-label", `${name}, layer ${layer}: picks ${used[layer].map(([e]) => `e${e}`).join(", ")}`);
      });
      const all = used.reduce((n, layer) => n + layer.length, 0);
      const last = at === steps.length - 1;
      settled.textContent = last ? "These are the experts it ends with." : `Of these ${all} experts, ${same || "none"} will be picked in the end.`;
      count.textContent = known[at];
      bar.style.width = `${(100 * known[at]) / nFacts}%`;
    }

    return { node, draw };
  }

  const panels = models.map(panelOf);
  const slider = make("input", { type: "range", min: 0, max: steps.length - 1, value: 0, id: "film", "aria-label": "steps of training" });
  const step = make("span", { className: "step" });
  const question = make("select", { "aria-label": "question" }, ...questions.map((words, n) => make("option", { value: n }, words)));
  const learnt = questions.findIndex((_, n) => models.every(({ answers }) => answers.at(-1)[n].right));
  question.value = Math.max(0, learnt); // begin with one that both models learn
  const play = make("button", { type: "button" }, "Play");

  function draw() {
    const at = Number(slider.value);
    step.textContent = `step ${stepName(at)}`;
    slider.setAttribute("aria-valuetext", step.textContent);
    panels.forEach((panel) => panel.draw(at, Number(question.value)));
  }

  function stop() {
    clearInterval(playing);
    playing = null;
    play.textContent = "Play";
  }

  play.addEventListener("click", () => {
    if (playing) return stop();
    if (Number(slider.value) === steps.length - 1) slider.value = 0;
    draw();
    play.textContent = "Pause";
    playing = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      draw();
      if (Number(slider.value) === steps.length - 1) stop();
    }, PAUSE);
    return playing;
  });
  slider.addEventListener("input", () => {
    stop();
    draw();
  });
  question.addEventListener("change", draw);
  box.replaceChildren(make("div", { className: "row film" }, play, slider, step, question), make("div", { className: "panels" }, ...panels.map(({ node }) => node)));
  draw();
})(window.dsmoePage);
