// The playground: two models side by side learn the same picture in front of the reader.
(function (scope) {
  "use strict";

  const {
    Run, LESSONS, FREE, NAMES, make, action, drawTiles, drawCurves, configOf, storyOf, panelOf, fieldsOf, trySeeds, writeAddress, readAddress,
  } = scope.dsmoePlayground;
  const FRAME = 13; // ms of training per frame; drawing takes the rest of 33
  const APART = 33; // ms between drawings
  const CALM_APART = 600; // for readers who want no motion
  const SECONDS = 6; // of a lesson, so that there is time to watch; fewer without motion
  const MORE = 1000; // steps after a change to models that have learnt
  const LEGEND = "Bar under a card: how much of the work this expert does; the line marks an equal share. Point at a card to see its tiles. Click it to switch the expert off.";

  // evidence: {lesson: {steps, a: [error of each seed], b, control}}; lesson: shown first; link: of a chapter's number.
  function mount(box, { lesson = "collapse", evidence = {}, useAddress = false, link = null } = {}) {
    // settings: with which the run began; changes: made since; tried: the lesson's mend that runs; kept: the end of the
    // lesson, {step, goBack}; seeds: what ten seeds show
    const state = { lesson, control: false, seed: 1, settings: [{}, {}], task: "patches", steps: 1000, isOwn: false, phase: "ready" };
    let [run, job, lastDrawn, began] = [null, 0, 0, null]; // began: {time, step} of the training that runs
    const calm = scope.matchMedia("(prefers-reduced-motion: reduce)").matches;
    const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

    // ---- Runs

    function begin() {
      job += 1;
      run = new Run(state.task, state.settings, state.seed, state.steps);
      Object.assign(state, { phase: "ready", changes: [], tried: null, kept: null, seeds: null, guess: null });
      panels.forEach((panel) => panel.build(run));
      drawTiles(target, run.task.pictures, run.task.side);
      ofAll.hidden = !run.task.common;
      if (run.task.common) drawTiles(common, [run.task.common], 1);
      seedField.value = state.seed;
      if (useAddress) writeAddress(state);
      show();
    }

    function load(name, control = false, isStarted = false) {
      const { a, b, task, steps, control: other } = LESSONS[name];
      Object.assign(state, { lesson: name, control, settings: [{ ...a }, { ...b }], task: control ? other.task : task, steps, isOwn: false });
      begin();
      if (isStarted) start();
    }

    function start() {
      Object.assign(state, { phase: "running", seeds: null });
      began = { time: performance.now(), step: run.steps };
      show();
      panels.forEach(({ choices }) => choices.scrollIntoView({ block: "nearest" })); // on a phone they may be out of sight
      requestAnimationFrame(frame);
    }

    // Train in this frame as many steps as are due, or until time is up; then draw.
    function frame() {
      if (state.phase !== "running" || !box.isConnected) return;
      const now = performance.now();
      const due = calm ? run.until : began.step + ((now - began.time) / 1000) * (state.steps / SECONDS);
      while (!run.isDone && run.steps < due && performance.now() < now + FRAME) run.step();
      story.progress(state, run);
      if (run.isDone) return finish();
      if (now - lastDrawn > (calm ? CALM_APART : APART)) {
        lastDrawn = now;
        NAMES.forEach((_, i) => run.look(i));
        draw();
      }
      return requestAnimationFrame(frame);
    }

    function finish() {
      state.phase = "done";
      if (!state.isOwn && !state.changes.length) state.kept = { step: run.steps, goBack: run.keep() };
      show();
    }

    function train() {
      const { guess } = state;
      if (run.steps) begin();
      state.guess = state.phase === "ready" ? guess : null;
      start();
    }

    function guess(words) {
      state.guess = words;
      start();
    }

    function pause() {
      if (state.phase !== "running") return;
      state.phase = "paused";
      NAMES.forEach((_, i) => run.look(i)); // as they are now
      show();
    }

    function goOn() {
      if (run.isDone) run.until += MORE;
      start();
    }

    // Go on to the next point of the curve.
    function some() {
      job += 1;
      if (run.isDone) return;
      while (!run.step());
      state.seeds = null;
      NAMES.forEach((_, i) => run.look(i));
      if (run.isDone) finish();
      else {
        state.phase = "paused";
        show();
      }
    }

    // Apply a mend of the lesson to the models that have learnt, always as they were at the end of the lesson.
    function intervene(tried) {
      if (state.tried || state.isOwn || run.steps > state.kept.step) {
        state.kept.goBack();
        const { a, b } = LESSONS[state.lesson];
        Object.assign(state, { settings: [{ ...a }, { ...b }], isOwn: false });
      }
      Object.assign(state, { tried, guess: null, changes: [] });
      tried.change.forEach((change, model) => Object.entries(change).forEach(([name, value]) => state.changes.push({ model, name, value, step: run.steps })));
      run.change(tried.change, MORE, "changed here");
      if (useAddress) writeAddress(state);
      start();
    }

    // A change by the fields: sizes begin anew, other settings change the models as they are.
    function change(i, name, value) {
      const config = configOf({ ...state.settings[i], [name]: value });
      say.textContent = "";
      if (config.top_k > config.n_routed_experts) {
        say.textContent = `A token cannot go to ${config.top_k} of ${config.n_routed_experts} experts: choose a smaller top-k first.`;
        return fields.sync({ settings: run.models.map((model) => model.config), task: state.task });
      }
      state.settings[i][name] = value;
      Object.assign(state, { isOwn: true, control: false });
      if (!(name in FREE) || !run.steps) return begin();
      run.change(NAMES.map((_, n) => (n === i ? { [name]: value } : {})), 0, "changed here");
      run.until = Math.max(run.until, state.steps);
      state.changes.push({ model: i, name, value, step: run.steps });
      state.tried = null;
      if (useAddress) writeAddress(state);
      return show();
    }

    function picture(task) {
      Object.assign(state, { isOwn: true, control: false, task });
      begin();
    }

    function toggle(i, e) {
      const { off, config } = run.models[i];
      if (!off.delete(e) && config.n_routed_experts - off.size > config.top_k) off.add(e);
      run.look(i);
      panels[i].draw();
    }

    const rest = () => (!run.steps ? "ready" : run.isDone ? "done" : "paused");

    async function manySeeds() {
      pause();
      job += 1;
      const mine = job;
      state.phase = "seeds";
      story.act.scrollIntoView({ block: "nearest" }); // on a phone it is above the models
      const seen = await trySeeds({ ...state, steps: run.until }, { colour, isWanted: () => mine === job && box.isConnected, show: (nodes) => {
        state.seeds = nodes;
        show();
      } });
      if (!seen) return;
      Object.assign(state, { phase: rest(), seeds: seen });
      show();
    }

    function stop() {
      job += 1;
      Object.assign(state, { phase: rest(), seeds: null });
      show();
    }

    // ---- What is seen

    function draw() {
      panels.forEach((panel) => panel.draw());
      const lines = run.points.map((points, i) => ({ name: NAMES[i], points, color: colour(`--pg-${NAMES[i].toLowerCase()}`) }));
      drawCurves(curve, lines, run, { ink: colour("--pg-ink"), grid: colour("--pg-grid") });
    }

    function show() {
      story.tell(state, run);
      fields.sync({ settings: run.models.map((model) => model.config), task: state.task });
      draw();
    }

    function arrive() {
      const found = readAddress(useAddress ? location.hash.slice(1) : "", lesson);
      state.seed = found.seed;
      if (!found.own) return load(found.lesson, found.control);
      Object.assign(state, found.own, { lesson: found.lesson, control: false, isOwn: true, steps: LESSONS[found.lesson].steps });
      return begin();
    }

    const story = storyOf({ load, guess, train, pause, goOn, intervene, stop, link, evidence });
    const panels = NAMES.map((_, i) => panelOf(i, { toggle: (e) => toggle(i, e), colour }));
    const fields = fieldsOf({ change, picture });
    const say = make("p", { className: "pg-say", role: "status" });
    const target = make("canvas", { role: "img", "aria-label": "The picture to learn" });
    const common = make("canvas", { role: "img", "aria-label": "The wave that all tiles have in common" });
    const ofAll = make("figure", {}, common, make("figcaption", {}, "Common wave"));
    const curve = make("canvas", { className: "pg-curve", role: "img", "aria-label": "Share of the picture unexplained, over the steps of training, on a logarithmic axis" });
    const seedField = make("input", { type: "number", min: 1, max: 9999, value: 1 });
    seedField.addEventListener("change", () => {
      state.seed = Math.min(9999, Math.max(1, Math.round(Number(seedField.value)) || 1));
      begin();
    });
    const reset = () => {
      state.seed = 1;
      load(state.lesson);
    };
    const tools = make("div", { className: "pg-row pg-tools" }, action("25 steps", some), action("Reset", reset), make("label", {}, "Seed ", seedField), action("Try ten seeds", manySeeds));
    const goal = make("div", { className: "pg-goal" },
      make("figure", {}, target, make("figcaption", {}, "The picture")), ofAll,
      make("figure", {}, curve, make("figcaption", {}, "Unexplained: 0% is a perfect copy, 100% is no better than one flat colour. Each grid line is a tenth of the one above")));
    const models = make("div", { className: "pg-models" }, ...panels.map(({ node }) => node), goal, ...panels.map(({ deck }) => deck), make("p", { className: "pg-legend" }, LEGEND));
    const root = make("div", { className: "dsmoe-playground" }, make("div", { className: "pg-frame" }, story.tabs,
      make("div", { className: "pg-body" }, make("div", { className: "pg-story" }, story.ask, story.act, story.explain, tools, story.glossary), models),
      make("details", { className: "pg-change" }, make("summary", {}, "Change the models"), fields.node, say)));
    box.append(root);
    arrive();
    const watcher = new ResizeObserver(() => {
      story.hold();
      draw(); // canvases are as fine as the screen
    });
    watcher.observe(root);
    if (useAddress) scope.addEventListener("hashchange", arrive);
    return () => {
      state.phase = "left";
      job += 1;
      watcher.disconnect();
      scope.removeEventListener("hashchange", arrive);
    };
  }

  Object.assign(scope.dsmoePlayground, { mount });
})(typeof globalThis === "undefined" ? self : globalThis);
