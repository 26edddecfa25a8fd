// The playground: two models side by side learn the same picture in front of the reader.
(function (scope) {
  "use strict";

  const { MoE, Task, LESSONS, configOf, drawTiles, drawChoices, drawCurves, colorOf } = scope.dsmoePlayground;
  const FRAME = 13; // ms of training per frame; drawing takes the rest of 33
  const CALM_FRAME = 600; // ms between drawings for readers who want no motion
  const SAME = 1.25; // errors within this factor are no clear difference
  const SEEDS = 10;
  const NAMES = ["A", "B"];
  const SIZES = { n_routed_experts: "experts", top_k: "per token (top-k)", n_shared_experts: "shared experts", expert_width: "expert width" };
  const FREE = { balance: "balance loss, weight", bias_speed: "bias speed", capacity_factor: "capacity" };
  const CHOICES = {
    n_routed_experts: [4, 8, 12, 16, 24, 28, 32, 48, 64],
    top_k: [1, 2, 3, 4, 6, 7, 8],
    n_shared_experts: [0, 1, 2, 4],
    expert_width: [2, 4, 8, 16, 32],
    balance: [0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30],
    bias_speed: [0, 0.001, 0.003, 0.01, 0.03, 0.1],
    capacity_factor: [null, 1, 1.25, 1.5, 2],
  };
  const TASKS = {
    patches: "16 tiles, each its own wave",
    common: "16 tiles, one wave in common",
    quilt: "64 tiles, column wave + row wave",
    columns: "64 tiles, the column's wave",
    uncommon: "16 tiles, slow waves of their own",
  };
  const percent = (error) => `${error >= 0.0995 ? Math.round(100 * error) : (100 * error).toFixed(1)}%`;
  const median = (values) => {
    const sorted = [...values].sort((a, b) => a - b);
    const middle = sorted.length / 2;
    return (sorted[Math.floor(middle)] + sorted[Math.ceil(middle - 1)]) / 2;
  };

  function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  function action(words, act, properties = {}) {
    const button = make("button", { type: "button", ...properties }, words);
    button.addEventListener("click", act);
    return button;
  }

  // The words that compare two errors.
  function verdict(a, b) {
    if (Math.max(a, b) / Math.min(a, b) < SAME) return "no clear difference";
    return a < b ? "A paints better" : "B paints better";
  }

  // Train two models on one picture, in pieces of 50 steps: the steps done, and in the end both errors.
  function* trainPair(kind, settings, seed, steps) {
    const task = new Task(kind, seed);
    const pair = settings.map((own) => new MoE(configOf(own), task, seed));
    for (let step = 1; step <= steps; step += 1) {
      const batch = task.batch();
      pair.forEach((model) => model.step(batch));
      if (step % 50 === 0) yield step;
    }
    yield pair.map((model) => task.paint(model).error);
  }

  // evidence: {lesson: {steps, a: [error of each seed], b, control}}; lesson: shown first; link: of a chapter's number.
  function mount(box, { lesson = "collapse", evidence = {}, useAddress = false, link = null } = {}) {
    const state = { lesson, control: false, seed: 1, settings: [{}, {}], task: "patches", steps: 1000 };
    let [task, models, histories, loads, dropped] = [null, [], [], [], []];
    let [running, guess, focus, painted, turn, job, lastDrawn, isDone] = [false, null, [null, null], [], 0, 0, 0, false];
    const calm = scope.matchMedia("(prefers-reduced-motion: reduce)").matches;

    // ---- Training

    function begin() {
      task = new Task(state.task, state.seed);
      models = state.settings.map((settings) => new MoE(configOf(settings), task, state.seed));
      histories = models.map(() => []);
      loads = models.map(({ config }) => new Float64Array(config.n_routed_experts));
      dropped = [0, 0];
      focus = [null, null];
      isDone = false;
      job += 1;
      running = false;
      panels.forEach((panel) => panel.build());
      drawTiles(target, task.pictures, task.side);
      models.forEach((_, i) => paint(i));
      label();
      result.replaceChildren();
      writeAddress();
    }

    // One step of both models, with the same tokens. Loads and drops are running means of some ten steps.
    function train() {
      const batch = task.batch();
      models.forEach((model, i) => {
        const { counts, dropped: n } = model.step(batch);
        const all = counts.reduce((a, b) => a + b);
        counts.forEach((count, e) => (loads[i][e] += 0.1 * ((count * counts.length) / all - loads[i][e])));
        dropped[i] += 0.1 * (n / all - dropped[i]);
      });
    }

    function frame() {
      if (!running || !box.isConnected) return;
      const until = performance.now() + FRAME;
      while (models[0].steps < state.steps && performance.now() < until) train();
      const done = models[0].steps >= state.steps;
      if (done || !calm || performance.now() - lastDrawn > CALM_FRAME) {
        lastDrawn = performance.now();
        turn = 1 - turn;
        if (done || calm) models.forEach((_, i) => paint(i));
        else paint(turn); // one of the two per frame
      }
      if (done) finish();
      else requestAnimationFrame(frame);
    }

    function run() {
      if (models[0].steps >= state.steps) begin();
      running = true;
      label();
      requestAnimationFrame(frame);
    }

    function pause() {
      if (running) models.forEach((_, i) => paint(i)); // as they are now
      running = false;
      label();
    }

    function paint(i) {
      painted[i] = task.paint(models[i]);
      histories[i].push([models[i].steps, painted[i].error]);
      panels[i].draw();
      const lines = histories.map((points, n) => ({ name: NAMES[n], points, color: colour(`--pg-${NAMES[n].toLowerCase()}`) }));
      drawCurves(curve, lines, state.steps, { ink: colour("--pg-muted"), grid: colour("--pg-grid") });
      counter.textContent = `${models[i].steps.toLocaleString("en")} of ${state.steps.toLocaleString("en")} steps`;
    }

    function finish() {
      running = false;
      label();
      isDone = true;
      const [a, b] = painted.map(({ error }) => error);
      const found = verdict(a, b);
      const lines = [make("p", {}, make("b", {}, `${found[0].toUpperCase()}${found.slice(1)}. `),
        `Of the picture A leaves ${percent(a)} unexplained, B ${percent(b)}.`,
        !guess ? "" : guess === found ? " As you said." : ` You said: ${guess}.`)];
      if (state.lesson in LESSONS) {
        const { look, tries = [], control, chapter } = LESSONS[state.lesson];
        if (!state.control) lines.push(make("p", {}, look));
        lines.push(...recorded());
        const next = tries.map(([words, change]) => action(words, () => intervene(change)));
        if (control) next.push(action(state.control ? "Back to the lesson" : control.name, () => load(state.lesson, !state.control)));
        if (link) next.push(make("a", { href: link(chapter) }, `Chapter ${chapter} asks this of a language model`));
        lines.push(make("div", { className: "pg-row" }, ...next));
      }
      result.replaceChildren(...lines);
    }

    function recorded() {
      const own = evidence[state.lesson];
      const found = state.control ? own?.control : own;
      if (!found) return [];
      const range = (errors) => `${percent(median(errors))} (${percent(Math.min(...errors))} to ${percent(Math.max(...errors))})`;
      const better = found.a.filter((error, n) => verdict(error, found.b[n]) === "B paints better").length;
      const worse = found.a.filter((error, n) => verdict(error, found.b[n]) === "A paints better").length;
      return [make("p", { className: "pg-muted" },
        `Recorded with ${found.a.length} seeds, ${found.steps.toLocaleString("en")} steps: A ${range(found.a)}, B ${range(found.b)}. `,
        `B painted better in ${better} runs, A in ${worse}.`)];
    }

    // Change settings of models that have learnt, and go on.
    function intervene(change) {
      ["a", "b"].forEach((name, i) => Object.assign(models[i].config, change[name] || {}));
      ["a", "b"].forEach((name, i) => Object.assign(state.settings[i], change[name] || {}));
      panels.forEach((panel) => panel.describe());
      state.steps = models[0].steps + 1000;
      guess = null;
      result.replaceChildren();
      isDone = false;
      run();
    }

    // The errors of ten other seeds, a few steps at a time so that the page stays alive.
    async function manySeeds() {
      pause();
      job += 1;
      const mine = job;
      const bar = make("progress", { max: SEEDS * state.steps, value: 0, "aria-label": "seeds" });
      const dots = make("canvas", { className: "pg-dots", role: "img" });
      result.replaceChildren(make("p", {}, `Training both models with seeds 1 to ${SEEDS} …`), bar);
      const errors = [[], []];
      for (let seed = 1; seed <= SEEDS; seed += 1) {
        for (const found of trainPair(state.task, state.settings, seed, state.steps)) {
          if (typeof found === "number") bar.value = (seed - 1) * state.steps + found;
          else found.forEach((error, i) => errors[i].push(error));
          await new Promise((resolve) => setTimeout(resolve));
          if (mine !== job || !box.isConnected) return;
        }
      }
      const better = errors[0].filter((error, n) => verdict(error, errors[1][n]) === "B paints better").length;
      const worse = errors[0].filter((error, n) => verdict(error, errors[1][n]) === "A paints better").length;
      const words = `Of ${SEEDS} seeds B paints better in ${better} and A in ${worse}. Unexplained, median: A ${percent(median(errors[0]))}, B ${percent(median(errors[1]))}.`;
      dots.setAttribute("aria-label", words);
      result.replaceChildren(make("p", {}, words), dots);
      const lines = errors.map((list, i) => ({ name: NAMES[i], errors: list, color: colour(`--pg-${NAMES[i].toLowerCase()}`) }));
      scope.dsmoePlayground.drawDots(dots, lines, { ink: colour("--pg-muted"), grid: colour("--pg-grid") });
    }

    // ---- What is drawn

    const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

    function panelOf(i) {
      const title = make("h3");
      const size = make("p", { className: "pg-muted" });
      const error = make("b", { className: "pg-error" });
      const facts = make("p", { className: "pg-muted pg-facts" });
      const picture = make("canvas", { role: "img" });
      const choices = make("canvas", { role: "img" });
      const strip = make("div", { className: "pg-experts", role: "group", "aria-label": `Experts of ${NAMES[i]}; press to switch off` });
      const node = make("section", { className: `pg-panel pg-${NAMES[i].toLowerCase()}`, "aria-label": `Model ${NAMES[i]}` },
        title, size,
        make("div", { className: "pg-pair" },
          make("figure", {}, picture, make("figcaption", {}, "What it paints")),
          make("figure", {}, choices, make("figcaption", {}, "Who paints a tile"))),
        make("p", { className: "pg-line" }, error, " unexplained"), facts, strip);
      let [squares, shared] = [[], null];

      // A texture's form, whatever its gate.
      function drawTexture(canvas, values) {
        const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-6);
        drawTiles(canvas, [values.map((value) => (1.5 * value) / largest)], 1);
      }

      function describe() {
        const { config } = models[i];
        const { n_routed_experts: E, top_k: K, n_shared_experts: S, balance, bias_speed: bias, capacity_factor: capacity } = config;
        const parts = [`${K} of ${E} experts`];
        if (S) parts.push(`${S} shared`);
        if (balance) parts.push(`balance loss ${balance}`);
        if (bias) parts.push(`bias ${bias}`);
        if (capacity) parts.push(`capacity ${capacity}`);
        if (!balance && !bias) parts.push("no balancing");
        title.textContent = `${NAMES[i]}: ${parts.join(", ")}`;
        const used = (K + S) * config.expert_width;
        size.textContent = `${models[i].nWeights.toLocaleString("en")} weights; ${used} hidden units per token`;
      }

      function build() {
        describe();
        const point = (e) => () => {
          focus[i] = e;
          draw();
        };
        squares = Array.from({ length: models[i].config.n_routed_experts }, (_, e) => {
          const texture = make("canvas");
          const load = make("i");
          const square = make("button", { type: "button", className: "pg-expert" }, texture, make("span", { className: "pg-load" }, load), make("small", {}, `e${e}`));
          square.style.setProperty("--own", colorOf(e));
          square.addEventListener("click", () => toggle(i, e));
          for (const event of ["mouseenter", "focus"]) square.addEventListener(event, point(e));
          for (const event of ["mouseleave", "blur"]) square.addEventListener(event, point(null));
          return { square, texture, load };
        });
        shared = models[i].shared && make("canvas");
        const always = shared && make("div", { className: "pg-expert pg-shared" }, shared, make("small", {}, "shared"));
        strip.replaceChildren(...(always ? [always] : []), ...squares.map(({ square }) => square));
      }

      function draw() {
        if (!painted[i]) return;
        const { tiles, textures, error: found } = painted[i];
        drawTiles(picture, tiles.map((tile) => tile.painted), task.side);
        drawChoices(choices, tiles, task.side, focus[i], { idle: colour("--pg-grid"), gap: colour("--pg-card") });
        const idle = Array.from(loads[i]).filter((load) => load < 0.1).length;
        error.textContent = percent(found);
        const words = [`${idle} idle`, `busiest ${Math.max(...loads[i]).toFixed(1)} × its share`];
        if (models[i].config.capacity_factor !== null) words.push(`${Math.round(100 * dropped[i])}% dropped`);
        facts.textContent = models[i].steps ? words.join(", ") : "";
        picture.setAttribute("aria-label", `What ${NAMES[i]} paints: ${percent(found)} of the picture unexplained`);
        choices.setAttribute("aria-label", `${new Set(tiles.flatMap(({ ids }) => ids)).size} of ${textures.length} experts paint the ${tiles.length} tiles`);
        if (shared) drawTexture(shared, painted[i].shared);
        squares.forEach(({ square, texture, load }, e) => {
          drawTexture(texture, textures[e]);
          load.style.height = `${Math.min(100, 33 * loads[i][e])}%`;
          const off = models[i].off.has(e);
          const n = tiles.filter(({ ids }) => ids.includes(e)).length;
          square.setAttribute("aria-pressed", String(off));
          square.classList.toggle("pg-idle", n === 0);
          square.title = off ? `e${e}: switched off` : `e${e}: ${n} tiles, ${loads[i][e].toFixed(1)} × its share of the tokens`;
          square.setAttribute("aria-label", square.title);
        });
      }

      return { node, build, draw, describe };
    }

    function toggle(i, e) {
      const { off, config } = models[i];
      if (!off.delete(e) && config.n_routed_experts - off.size > config.top_k) off.add(e);
      paint(i);
      histories[i].pop(); // no step was taken
      if (isDone) say.textContent = `${NAMES[i]} with ${off.size} experts off: ${percent(painted[i].error)} unexplained.`;
    }

    // ---- Controls

    function load(name, control = false) {
      const { a, b, task: own, steps, control: other } = LESSONS[name];
      Object.assign(state, { lesson: name, control, settings: [{ ...a }, { ...b }], task: control ? other.task : own, steps });
      guess = null;
      begin();
      arrange();
    }

    function arrange() {
      const known = LESSONS[state.lesson];
      chips.forEach((chip) => chip.setAttribute("aria-pressed", String(chip.dataset.lesson === state.lesson)));
      question.textContent = !known ? "Your own two models." : state.control ? `${known.control.name}. The same two models: which paints better now?` : known.question;
      say.textContent = "";
      settings.replaceChildren(taskField(), ...NAMES.map((_, i) => fields(i)));
    }

    function select(value, options, change) {
      const node = make("select");
      const all = options.includes(value) ? options : [...options, value].sort((a, b) => a - b);
      all.forEach((one) => node.append(make("option", { value: String(one), selected: one === value }, one === null ? "no limit" : String(one))));
      node.addEventListener("change", () => change(all[node.selectedIndex]));
      return node;
    }

    function fields(i) {
      const config = configOf(state.settings[i]);
      const row = (name, words) => make("label", {}, words, select(config[name], CHOICES[name], (value) => change(i, name, value)));
      return make("fieldset", {}, make("legend", {}, `Model ${NAMES[i]}`), ...Object.entries({ ...SIZES, ...FREE }).map(([name, words]) => row(name, words)));
    }

    function taskField() {
      const node = make("select");
      Object.entries(TASKS).forEach(([name, words]) => node.append(make("option", { value: name, selected: name === state.task }, words)));
      node.addEventListener("change", () => {
        Object.assign(state, { lesson: "own", task: node.value });
        begin();
        arrange();
      });
      return make("label", {}, "Picture", node);
    }

    function change(i, name, value) {
      const config = configOf({ ...state.settings[i], [name]: value });
      if (config.top_k > config.n_routed_experts) {
        say.textContent = `A token cannot go to ${config.top_k} of ${config.n_routed_experts} experts: choose a smaller top-k first.`;
        settings.replaceChildren(taskField(), ...NAMES.map((_, n) => fields(n)));
        return;
      }
      state.settings[i][name] = value;
      state.lesson = "own";
      if (name in FREE) {
        models[i].config[name] = value;
        panels[i].describe();
        writeAddress();
      } else begin();
      arrange();
    }

    function label() {
      if (!models.length) return;
      start.textContent = running ? "Pause" : models[0].steps >= state.steps ? "Train again" : models[0].steps ? "Go on" : "Train";
      guesses.hidden = !(state.lesson in LESSONS);
      for (const button of guesses.children) button.setAttribute("aria-pressed", String(button.textContent === guess));
    }

    // The address: #lesson=finer&seed=3, and for models of one's own their settings.
    function writeAddress() {
      if (!useAddress) return;
      const parts = new URLSearchParams({ lesson: state.lesson, seed: state.seed });
      if (state.control) parts.set("control", 1);
      if (state.lesson === "own") {
        parts.set("task", state.task);
        state.settings.forEach((settings, i) => parts.set(NAMES[i].toLowerCase(), Object.entries(settings).map((pair) => pair.join(":")).join(",")));
      }
      history.replaceState(null, "", `#${parts}`);
    }

    function readAddress() {
      const given = new URLSearchParams(useAddress ? location.hash.slice(1) : "");
      const seed = Number(given.get("seed") ?? 1);
      if (Number.isInteger(seed) && seed >= 1 && seed <= 9999) state.seed = seed;
      seedField.value = state.seed;
      const name = given.get("lesson") ?? lesson;
      if (Object.hasOwn(LESSONS, name)) return load(name, given.has("control") && "control" in LESSONS[name]);
      if (name !== "own") return load(Object.hasOwn(LESSONS, lesson) ? lesson : "collapse");
      const settingsOf = (text) => Object.fromEntries((text ?? "").split(",").map((pair) => pair.split(":"))
        .map(([key, value]) => [key, value === "null" ? null : Number(value)])
        .filter(([key, value]) => Object.hasOwn(CHOICES, key) && CHOICES[key].includes(value)));
      const both = ["a", "b"].map((key) => settingsOf(given.get(key)));
      const fits = both.every((settings) => configOf(settings).top_k <= configOf(settings).n_routed_experts);
      Object.assign(state, { lesson: "own", task: Object.hasOwn(TASKS, given.get("task")) ? given.get("task") : "patches", settings: fits ? both : [{}, {}], steps: 2000 });
      begin();
      return arrange();
    }

    const chips = Object.entries(LESSONS).map(([name, { name: words }]) => {
      const chip = action(words, () => load(name), { className: "pg-chip" });
      chip.dataset.lesson = name;
      return chip;
    });
    const question = make("p", { className: "pg-question" });
    const guesses = make("div", { className: "pg-row", role: "group", "aria-label": "Guess first" },
      ...["A paints better", "B paints better", "no clear difference"].map((words) => action(words, () => {
        if (models[0].steps) begin();
        guess = words;
        run();
      }, { className: "pg-chip" })));
    const start = action("Train", () => (running ? pause() : run()), { className: "pg-start" });
    const counter = make("span", { className: "pg-muted" });
    const seedField = make("input", { type: "number", min: 1, max: 9999, value: 1 });
    seedField.addEventListener("change", () => {
      state.seed = Math.min(9999, Math.max(1, Math.round(Number(seedField.value)) || 1));
      seedField.value = state.seed;
      begin();
    });
    const one = () => {
      pause();
      if (models[0].steps >= state.steps) return;
      train();
      models.forEach((_, i) => paint(i));
      label();
    };
    const bar = make("div", { className: "pg-row" }, start, action("Step", one), action("Reset", () => {
      begin();
      arrange();
    }), make("label", {}, "Seed ", seedField), action("Try ten seeds", manySeeds), counter);
    const target = make("canvas", { role: "img", "aria-label": "The picture to learn" });
    const curve = make("canvas", { className: "pg-curve", role: "img", "aria-label": "Share of the picture not explained, over the steps of training, on a logarithmic axis" });
    const panels = NAMES.map((_, i) => panelOf(i));
    const result = make("div", { className: "pg-result", role: "status" });
    const say = make("p", { className: "pg-say", role: "status" });
    const settings = make("div", { className: "pg-settings" });
    const root = make("div", { className: "dsmoe-playground" },
      make("div", { className: "pg-row", role: "group", "aria-label": "Lessons" }, ...chips), question, guesses, bar,
      make("div", { className: "pg-stage" },
        make("section", { className: "pg-goal", "aria-label": "The picture" },
          make("figure", {}, target, make("figcaption", {}, "The picture to learn")),
          make("figure", {}, curve, make("figcaption", {}, "Share of it not explained"))),
        ...panels.map(({ node }) => node)),
      result, say, make("details", {}, make("summary", {}, "Change the models"), settings));
    box.append(root);
    readAddress();
    if (useAddress) scope.addEventListener("hashchange", readAddress);
    return () => {
      running = false;
      job += 1;
      scope.removeEventListener("hashchange", readAddress);
    };
  }

  Object.assign(scope.dsmoePlayground, { mount, trainPair });
})(typeof globalThis === "undefined" ? self : globalThis);
