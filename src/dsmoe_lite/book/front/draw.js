// What the front page draws of one model: its answer, its layers with the router's picks, and a dot for each fact.
(function (page) {
  "use strict";

  const { make, percent, shade, mark, shortOf } = page;
  const N_EXAMPLES = 5; // of lost facts
  const POINT = "One dot per fact, filled if known. Point at one or tap it to read it.";
  const STRIP = 40; // dots in a row, as in front.css

  // One layer: the word, its router, a square per expert, lines to the picked ones. One tab stop; arrows move.
  function layerOf({ name, moe }, layer, onSwitch) {
    const { n_routed_experts: E, top_k: K, n_shared_experts: nShared } = moe;
    const experts = [...(nShared ? ["shared"] : []), ...Array(E).keys()];
    const squares = experts.map((e) => {
      const square = make("button", { type: "button", className: e === "shared" ? e : "" });
      square.dataset.number = e === "shared" ? "S" : e; // seen while it is off
      square.addEventListener("click", () => onSwitch(`${layer} ${e}`));
      return square;
    });
    const kind = E <= 16 ? "large" : "small";
    const grid = make("div", { className: `experts ${kind}`, role: "group", "aria-label": `${name}, layer ${layer}` });
    grid.append(...squares);
    const word = make("span", { className: "read" });
    const router = make("b", { className: "router" }, "router");
    const picks = make("span", { className: "picks" }, `picks ${K} of ${E}`);
    const keys = make("span", { className: "keys" }, "arrows move, Space switches");
    const head = make("div", { className: "layer-name" });
    head.append(make("span", {}, `layer ${layer}`), make("span", { className: "way" }, word, " → ", router), picks, keys);
    const lines = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    lines.setAttribute("aria-hidden", "true");
    const node = make("div", { className: "layer" }, head, grid, lines);
    let shown = new Map();

    function stopAt(e) {
      squares.forEach((square, n) => (square.tabIndex = experts[n] === e ? 0 : -1));
    }

    grid.addEventListener("keydown", (event) => {
      const at = squares.indexOf(event.target);
      const columns = getComputedStyle(grid).gridTemplateColumns.split(" ").length;
      const sideways = { ArrowLeft: -1, ArrowRight: 1, Home: -at, End: squares.length - 1 - at };
      const step = { ...sideways, ArrowUp: -columns, ArrowDown: columns }[event.key];
      if (step === undefined || !squares[at + step]) return;
      event.preventDefault();
      stopAt(experts[at + step]);
      squares[at + step].focus();
    });

    // A line from the router to each picked expert, as thick as its share.
    function link() {
      const box = node.getBoundingClientRect();
      const from = router.getBoundingClientRect();
      const largest = Math.max(...shown.values());
      lines.replaceChildren(...[...shown].map(([e, share]) => {
        const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
        const to = squares[experts.indexOf(e)].getBoundingClientRect();
        const ends = { x1: (from.left + from.right) / 2 - box.left, y1: from.bottom - box.top };
        Object.assign(ends, { x2: (to.left + to.right) / 2 - box.left, y2: to.top - box.top + 2 });
        for (const [key, value] of Object.entries(ends)) line.setAttribute(key, value.toFixed(1));
        line.setAttribute("stroke-width", (1 + 1.5 * (share / largest)).toFixed(2));
        return line;
      }));
    }
    new ResizeObserver(link).observe(node);

    // shares: expert -> share; off: experts of all layers that are off.
    function draw(read, shares, off) {
      shown = shares;
      word.textContent = `“${read}”`;
      const largest = Math.max(...shares.values());
      squares.forEach((square, n) => {
        const e = experts[n];
        const share = shares.get(e) ?? 0;
        const isOff = off.has(`${layer} ${e}`);
        shade(square, share, largest);
        square.setAttribute("aria-pressed", String(isOff));
        const role = e === "shared" ? "on for every word" : share ? `picked, share ${percent(share)}` : "not picked";
        const label = `${e === "shared" ? "shared expert" : `expert ${e}`} of layer ${layer}, `;
        square.title = `${label}${isOff ? "switched off" : role}`;
        square.setAttribute("aria-label", square.title);
      });
      link();
    }

    // The keyboard enters the layer at the expert with the largest share.
    function stopAtMostUsed() {
      stopAt([...shown].sort((a, b) => b[1] - a[1])[0][0]);
    }

    // Mark a square and return it; the keyboard enters the layer there.
    function find(e) {
      stopAt(e);
      const square = squares[experts.indexOf(e)];
      square.classList.add("found");
      return square;
    }

    function lose() {
      squares.forEach((square) => square.classList.remove("found"));
    }

    return { node, draw, stopAtMostUsed, find, lose };
  }

  // A dot per fact; point(n) when a reader points at one.
  function stripOf(nFacts, point) {
    const dots = Array.from({ length: nFacts }, () => make("i"));
    const node = make("div", { className: "strip", role: "img" }, ...dots);
    const aim = ({ clientX, clientY }) => {
      const { left, top, width, height } = node.getBoundingClientRect();
      const column = Math.floor((STRIP * (clientX - left)) / width);
      const row = Math.floor((Math.ceil(nFacts / STRIP) * (clientY - top)) / height);
      const n = row * STRIP + column;
      if (column >= 0 && column < STRIP && dots[n]) point(n);
    };
    node.addEventListener("pointermove", aim);
    node.addEventListener("pointerdown", aim);

    function draw(found, asked, pointed) {
      dots.forEach((dot, n) => {
        const state = n < found.length ? (found[n].known ? "knows" : "lost") : "";
        dot.className = `${state}${n === asked ? " asked" : ""}${n === pointed ? " pointed" : ""}`;
      });
    }

    return { node, draw };
  }

  // actions: {onSwitch(expert), onAsk(n), onPoint(n)}
  function panelOf(subject, actions) {
    const { name, moe, model, questions } = subject;
    const layers = Array.from({ length: model.nMoeLayers }, (_, layer) => layerOf(subject, layer, actions.onSwitch));
    const answers = make("div", { className: "answers" });
    const written = make("p", { className: "written", hidden: true });
    const count = make("b", {}, "…");
    const strip = stripOf(questions.length, actions.onPoint);
    const fact = make("p", { className: "fact" });
    const lost = make("div", { className: "examples" });
    const large = moe.n_routed_experts <= 16 ? "large" : "small";
    const kinds = moe.n_shared_experts ? `, ${moe.n_shared_experts} shared` : " experts";
    const size = `${moe.n_routed_experts} ${large}${kinds} per layer`;
    const node = make("section", { className: `panel ${name.toLowerCase()}`, "aria-label": name });
    node.append(make("h2", {}, name, make("small", {}, size)), answers, written, ...layers.map((layer) => layer.node));
    node.append(make("div", { className: "known" }, "still knows ", count, " facts"), strip.node, fact, lost);
    let [found, asked, pointed] = [[], 0, -1];

    // said: of Subject.ask; at: the word whose experts are shown.
    function draw(n, said, at, off) {
      asked = n;
      answers.replaceChildren(...said.shown.map((answer) => {
        const bar = make("span", { className: "bar" });
        bar.style.width = `${Math.max(1, 100 * answer.p)}%`;
        const row = make("div", { className: "answer" }, make("span", {}, mark(answer)), bar, make("span", {}, percent(answer.p)));
        row.classList.toggle("right", answer.right);
        return row;
      }));
      drawRoutes(said.words[at], said.routes[at], off);
      strip.draw(found, asked, pointed);
    }

    function drawRoutes(read, routes, off) {
      layers.forEach((layer, number) => layer.draw(read, routes[number], off));
    }

    // now: the answers to the questions asked so far.
    function showCount(now, prompts) {
      found = now;
      const known = now.filter((one) => one.known).length;
      const done = now.length === questions.length;
      count.textContent = done ? `${known} of ${now.length}` : "…";
      strip.draw(found, asked, pointed);
      const missing = now.flatMap((one, n) => (one.known ? [] : [n]));
      const numbers = done ? `${known} of ${now.length} facts known, ${missing.length} lost` : "counting";
      strip.node.setAttribute("aria-label", `${name}: a dot for each fact. ${numbers}.`);
      lost.replaceChildren(...(done && missing.length ? examples(now, missing, prompts) : []));
    }

    function examples(now, missing, prompts) {
      const items = missing.slice(0, N_EXAMPLES).map((n) => {
        const words = `${shortOf(prompts[n])}: ${subject.word(questions[n].right)}, now ${subject.word(now[n].id)}`;
        const button = make("button", { type: "button" }, words);
        button.addEventListener("click", () => actions.onAsk(n));
        button.addEventListener("focus", () => actions.onPoint(n));
        return make("li", {}, button);
      });
      const more = missing.length > N_EXAMPLES ? `${N_EXAMPLES} of the ${missing.length} lost facts` : "Lost";
      return [make("p", {}, `${more}; click one to ask it:`), make("ul", {}, ...items)];
    }

    // Of dot n, or of none.
    function showFact(n = -1, ...content) {
      pointed = n;
      strip.draw(found, asked, pointed);
      fact.replaceChildren(...(content.length ? content : [POINT]));
    }

    function write(...content) {
      written.hidden = content.length === 0;
      written.replaceChildren(...content);
    }

    function find(expert) {
      const [layer, e] = expert.split(" ");
      return layers[Number(layer)].find(e === "shared" ? e : Number(e));
    }

    const resetStops = () => layers.forEach((layer) => layer.stopAtMostUsed());
    const lose = () => layers.forEach((layer) => layer.lose());
    return { node, draw, drawRoutes, showCount, showFact, write, written, find, lose, resetStops };
  }

  Object.assign(page, { panelOf });
})(window.dsmoePage);
