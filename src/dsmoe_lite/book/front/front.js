// The front page: ask two trained models a question, switch experts off, and count what is still known.
(function () {
  "use strict";

  const { questions, models: described } = window.dsmoeFront; // [prompt, answer] each; {name, weights, config} each
  const N_CHIPS = 6;
  const N_SHOWN = 3; // likeliest answers
  const WRITTEN = 24; // tokens
  const root = document.getElementById("lab");
  const state = { question: 0, off: described.map(() => new Set()) }; // off: "layer expert", "layer shared"
  let models = [];
  let counting = 0; // the number of the latest count; an earlier one stops
  const panels = [];
  const HINT = "Click a square, or let a button choose. The coloured squares are the experts that gave this answer.";
  const say = make("p", { className: "say", role: "status" }, HINT);
  const asked = make("p", { className: "asked" });
  const wait = (ms = 0) => new Promise((resolve) => setTimeout(resolve, ms));
  const percent = (share) => `${Math.round(100 * share)}%`;

  function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  function load({ weights, config }) {
    return new Promise((resolve, reject) => {
      const node = make("script", { src: `${window.dsmoeModelFolder}${weights}.js` });
      node.onload = () => resolve(dsmoeEngine.read({ ...window.dsmoeModels[weights], config }));
      node.onerror = () => reject(new Error("The models are missing from this copy of the book."));
      document.head.append(node);
    });
  }

  // ---- What a model says

  // The likeliest next tokens, p of the right one, and the experts that the last token uses in each layer.
  function ask(i, off = state.off[i]) {
    const model = models[i];
    const [prompt, answer] = questions[state.question];
    const { ids } = model.tokenizer.encode(prompt);
    const right = model.tokenizer.encode(answer).ids[0];
    const { logits, routings } = model.forward(ids, { off });
    const p = model.distribution(logits, 1);
    const best = Array.from(p.keys()).sort((a, b) => p[b] - p[a]).slice(0, N_SHOWN);
    if (!best.includes(right)) best[N_SHOWN - 1] = right;
    const K = model.config.moe.top_k;
    const used = routings.map(({ ids: chosen, gates }) => {
      const from = chosen.length - K;
      return new Map(Array.from({ length: K }, (_, k) => [chosen[from + k], gates[from + k]]));
    });
    return { p, best, right, used, word: (id) => model.tokenizer.decode([id]).trim() || "∙" };
  }

  // The expert of one layer or the other without which the right answer is least likely.
  function mostNeeded(i, off) {
    const { used, right } = ask(i, off);
    const candidates = used.flatMap((experts, layer) => [...experts.keys()].map((e) => `${layer} ${e}`));
    const left = (expert) => ask(i, new Set([...off, expert])).p[right];
    return candidates.map((expert) => [left(expert), expert]).sort((a, b) => a[0] - b[0])[0][1];
  }

  function knows(i, [prompt, answer], off) {
    const model = models[i];
    const { logits } = model.forward(model.tokenizer.encode(prompt).ids, { off });
    const V = model.config.vocab_size;
    const last = logits.subarray(logits.length - V);
    return last.indexOf(last.reduce((a, b) => Math.max(a, b))) === model.tokenizer.encode(answer).ids[0];
  }

  // Ask all questions, a few at a time so that the page stays alive; stop if the experts have changed meanwhile.
  async function count() {
    const mine = (counting += 1);
    const known = models.map(() => 0);
    for (let n = 0; n < questions.length; n += 1) {
      models.forEach((_, i) => (known[i] += knows(i, questions[n], state.off[i])));
      if (n % 8 === 7 || n + 1 === questions.length) {
        await wait();
        if (mine !== counting) return;
        panels.forEach((panel, i) => panel.showKnown(known[i], n + 1));
      }
    }
  }

  // ---- What is drawn

  function panelOf(i) {
    const { name } = described[i];
    const { moe } = models[i].config;
    const answers = make("div", { className: "answers" });
    const large = moe.n_routed_experts <= 16;
    const layers = Array.from({ length: models[i].nMoeLayers }, (_, layer) => gridOf(i, layer, large));
    const count = make("b", {}, "…");
    const bar = make("i");
    const track = make("div", { className: "track" }, bar);
    const known = make("div", { className: "known" }, "still knows ", count, " facts", track);
    const written = make("p", { className: "written" });
    const shared = moe.n_shared_experts ? `, ${moe.n_shared_experts} always on` : "";
    const size = make("small", {}, `${moe.n_routed_experts} experts, ${moe.top_k} per word${shared}`);
    const named = layers.flatMap(({ node, layer }) => [make("p", { className: "layer-name" }, `layer ${layer}`), node]);
    const heading = make("h2", {}, name, size);
    const node = make("section", { className: `panel ${name.toLowerCase()}`, "aria-label": name });
    node.append(heading, answers, ...named, known, written);

    function draw() {
      const { p, best, right, used, word } = ask(i);
      answers.replaceChildren(...best.map((id) => {
        const bar = make("span", { className: "bar" });
        bar.style.width = `${Math.max(1, 100 * p[id])}%`;
        const said = make("span", {}, `${word(id)}${id === right ? " ✓" : ""}`);
        const row = make("div", { className: "answer" }, said, bar, make("span", {}, percent(p[id])));
        row.classList.toggle("right", id === right);
        return row;
      }));
      layers.forEach((grid, layer) => grid.draw(used[layer]));
    }

    function showKnown(right, asked) {
      count.textContent = asked < questions.length ? "…" : `${right} of ${asked}`;
      bar.style.width = `${(100 * right) / asked}%`;
    }

    return { node, draw, showKnown, layers, written };
  }

  // One layer: a square per expert, a switch each; one tab stop, arrows move.
  function gridOf(i, layer, large) {
    const { n_routed_experts: E, n_shared_experts } = models[i].config.moe;
    const columns = large ? 8 : 16;
    const experts = [...(n_shared_experts ? ["shared"] : []), ...Array.from({ length: E }, (_, e) => e)];
    const squares = experts.map((e, n) => {
      const square = make("button", { type: "button", tabIndex: n ? -1 : 0, className: e === "shared" ? e : "" });
      square.addEventListener("click", () => toggle(i, `${layer} ${e}`));
      return square;
    });
    const node = make("div", { className: `experts ${large ? "large" : "small"}`, role: "group" }, ...squares);
    node.setAttribute("aria-label", `${described[i].name}, layer ${layer}`);
    node.addEventListener("keydown", (event) => {
      const at = squares.indexOf(event.target);
      const sideways = { ArrowLeft: -1, ArrowRight: 1, Home: -at, End: squares.length - 1 - at };
      const step = { ...sideways, ArrowUp: -columns, ArrowDown: columns }[event.key];
      if (step === undefined || !squares[at + step]) return;
      event.preventDefault();
      squares[at].tabIndex = -1;
      squares[at + step].tabIndex = 0;
      squares[at + step].focus();
    });

    function draw(used) { // used: expert -> gate
      const sum = [...used.values()].reduce((a, b) => a + b, 0) || 1;
      squares.forEach((square, n) => {
        const e = experts[n];
        const off = state.off[i].has(`${layer} ${e}`);
        const share = used.has(e) ? used.get(e) / sum : 0;
        square.style.setProperty("--used", used.has(e) ? 30 + 70 * share : 0);
        square.setAttribute("aria-pressed", String(off));
        const part = used.has(e) ? `${percent(share)} of the gates` : "not used here";
        const what = off ? "switched off" : e === "shared" ? "always on" : part;
        const name = e === "shared" ? "shared expert" : `expert ${e}`;
        square.setAttribute("aria-label", `${name} of layer ${layer}, ${what}`);
        square.title = square.getAttribute("aria-label");
      });
    }

    return { node, layer, draw };
  }

  function draw() {
    panels.forEach((panel) => panel.draw());
    asked.textContent = questions[state.question][0];
    chips.forEach((chip, n) => chip.setAttribute("aria-pressed", String(n === state.question)));
    writeAddress();
    count();
  }

  // ---- What a reader does

  function change(i, off) {
    state.off[i] = off;
    panels.forEach((panel) => panel.written.replaceChildren());
    say.textContent = HINT;
  }

  function toggle(i, expert) {
    const off = new Set(state.off[i]);
    if (!off.delete(expert)) off.add(expert);
    try {
      ask(i, off);
      change(i, off);
      draw();
    } catch (error) { // too few are left
      say.textContent = error.message;
    }
  }

  // Switch off n of the experts that this answer needs most, the neediest first, in every model; n per model.
  function breakMost(numbers) {
    numbers.forEach((n, i) => {
      const off = new Set();
      for (let k = 0; k < n; k += 1) off.add(mostNeeded(i, off));
      change(i, off);
    });
    const found = panels.map((_, i) => {
      const { p, best, right, word } = ask(i);
      const first = best.reduce((a, b) => (p[b] > p[a] ? b : a));
      const answer = first === right ? `still says ${word(right)}` : `now says ${word(first)}`;
      return `${described[i].name} ${answer} (${percent(p[right])} for the right word)`;
    });
    const one = "The expert that this answer needs most is off.";
    const what = numbers[0] === numbers[1] ? one : "One large expert is off, and four small ones: as many weights.";
    say.textContent = `${what} ${found.join("; ")}.`;
    draw();
  }

  async function write() {
    const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    const [prompt] = questions[state.question];
    const mine = counting;
    const start = (model, i) => model.generate(model.tokenizer.encode(prompt).ids, WRITTEN, { off: state.off[i] });
    const writers = models.map(start);
    panels.forEach((panel) => panel.written.replaceChildren(make("b", {}, prompt)));
    for (let n = 0; n < WRITTEN; n += 1) {
      writers.forEach((writer, i) => {
        const { value } = writer.next();
        if (!value) return;
        panels[i].written.append(value.id === 0 ? " ¶" : models[i].tokenizer.decode([value.id]));
        const K = models[i].config.moe.top_k;
        value.routings.forEach(({ ids, gates }, layer) => {
          const from = ids.length - K;
          panels[i].layers[layer].draw(new Map(Array.from({ length: K }, (_, k) => [ids[from + k], gates[from + k]])));
        });
      });
      if (!calm) await wait(120);
      if (mine !== counting) return; // something was switched meanwhile
    }
  }

  // ---- The address: #q=3&off0=0.6,1.2&off1=0.17

  function writeAddress() {
    const parts = [`q=${state.question}`];
    state.off.forEach((off, i) => {
      if (off.size) parts.push(`off${i}=${[...off].map((expert) => expert.replace(" ", ".")).join(",")}`);
    });
    history.replaceState(null, "", `#${parts.join("&")}`);
  }

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    const question = Number(given.get("q"));
    if (Number.isInteger(question) && question >= 0 && question < questions.length) state.question = question;
    state.off = described.map(({ config }, i) => {
      const { n_routed_experts: E, n_shared_experts: shared, top_k: K } = config.moe;
      const exists = (expert) => {
        const [, layer, e] = /^(\d)\.(\d+|shared)$/.exec(expert) || [];
        return layer < models[i].nMoeLayers && (e === "shared" ? shared > 0 : e < E);
      };
      const off = (given.get(`off${i}`) || "").split(",").filter(exists).map((expert) => expert.replace(".", " "));
      return new Set(off.slice(0, E - K)); // what is left is enough for a token
    });
  }

  const chips = questions.slice(0, N_CHIPS).map(([prompt], n) => {
    const chip = make("button", { type: "button", className: "chip" }, prompt);
    chip.addEventListener("click", () => {
      state.question = n;
      say.textContent = HINT;
      panels.forEach((panel) => panel.written.replaceChildren());
      draw();
    });
    return chip;
  });

  function action(words, act) {
    const button = make("button", { type: "button" }, words);
    button.addEventListener("click", act);
    return button;
  }

  async function begin() {
    root.replaceChildren(make("p", { role: "status" }, "Loading two models, 5 MB …"));
    try {
      models = await Promise.all(described.map(load));
    } catch (error) {
      root.replaceChildren(make("p", { role: "status" }, `${error.message} The chapters below need none of this.`));
      return;
    }
    readAddress();
    panels.push(...models.map((_, i) => panelOf(i)));
    const actions = [
      action("Break what this answer needs most", () => breakMost([1, 1])),
      action("Break one large, four small", () => breakMost([1, 4])),
      action("Let them write", write),
      action("All on again", () => {
        models.forEach((_, i) => change(i, new Set()));
        draw();
      }),
    ];
    root.replaceChildren(
      make("div", { className: "row", role: "group", "aria-label": "Questions" }, ...chips),
      make("div", { className: "row" }, ...actions),
      say,
      asked,
      make("div", { className: "panels" }, ...panels.map(({ node }) => node)),
    );
    draw();
  }

  window.addEventListener("hashchange", () => {
    readAddress();
    draw();
  });
  begin();
})();
