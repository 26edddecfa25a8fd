// The film of the front page: two models in the course of their training, from numbers that were computed with the book.
(function () {
  "use strict";

  const { steps, n_facts: nFacts, questions, models } = window.dsmoeFront.learning;
  const box = document.getElementById("learning");
  const PAUSE = 1100; // ms per snapshot when the film plays
  const percent = (share) => `${Math.round(100 * share)}%`;
  let playing = null;

  function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  function panelOf({ name, n_experts: E, n_shared: shared, known, answers }) {
    const says = make("p", { className: "says" });
    const count = make("b");
    const bar = make("i");
    const settled = make("p", { className: "layer-name" });
    const grids = answers[0][0].used.map((_, layer) => {
      const squares = Array.from({ length: shared + E }, (_, n) => make("span", { className: n < shared ? "shared" : "" }));
      const node = make("div", { className: `experts ${E <= 16 ? "large" : "small"}`, role: "img" }, ...squares);
      return { node, squares, label: make("p", { className: "layer-name" }, `layer ${layer}`) };
    });
    const node = make("section", { className: `panel ${name.toLowerCase()}`, "aria-label": `${name} in training` },
      make("h3", {}, name), says, ...grids.flatMap(({ node: grid, label }) => [label, grid]), settled,
      make("div", { className: "known" }, "knows ", count, ` of ${nFacts} facts`, make("div", { className: "track" }, bar)));

    function draw(at, question) {
      const { says: said, p, right, word, p_right: ofRight, used } = answers[at][question];
      const final = answers.at(-1)[question].used;
      says.replaceChildren("says ", make("b", {}, said || "∙"), ` (${percent(p)})${right ? " ✓" : `; the right word, ${word}, gets ${percent(ofRight)}`}`);
      let same = 0;
      grids.forEach(({ node: grid, squares }, layer) => {
        const sum = used[layer].reduce((all, [, gate]) => all + gate, 0) || 1;
        const gates = new Map(used[layer]);
        const last = new Set(final[layer].map(([e]) => e));
        same += used[layer].filter(([e]) => last.has(e)).length;
        squares.forEach((square, n) => {
          const e = n - shared;
          square.style.setProperty("--used", gates.has(e) ? 30 + (70 * gates.get(e)) / sum : 0);
        });
        grid.setAttribute("aria-label", `${name}, layer ${layer}: uses ${used[layer].map(([e]) => `e${e}`).join(", ")}`);
      });
      const all = used.reduce((n, layer) => n + layer.length, 0);
      settled.textContent = `${same} of its ${all} experts are the ones it uses in the end`;
      count.textContent = known[at];
      bar.style.width = `${(100 * known[at]) / nFacts}%`;
    }

    return { node, draw };
  }

  const panels = models.map(panelOf);
  const slider = make("input", { type: "range", min: 0, max: steps.length - 1, value: 0, id: "film", "aria-label": "steps of training" });
  const step = make("span");
  const question = make("select", { "aria-label": "question" }, ...questions.map((words, n) => make("option", { value: n }, words)));
  const play = make("button", { type: "button" }, "Play");

  function draw() {
    const at = Number(slider.value);
    step.textContent = `step ${steps[at].toLocaleString("en")}`;
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
  box.replaceChildren(make("div", { className: "row" }, play, slider, step, question), make("div", { className: "panels" }, ...panels.map(({ node }) => node)));
  draw();
})();
