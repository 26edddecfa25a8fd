// What stands beside the models: lesson, question, guess, verdict, next steps, and the reasons.
(function (scope) {
  "use strict";

  const {
    make, action, LESSONS, WORDS, EVERYWHERE, GUESSES, NAMES, count, endOf, spikeWords, costWords, recordWords, changeWords, configOf,
  } = scope.dsmoePlayground;
  const valueOf = (words, run) => (typeof words === "function" ? words(run) : words);

  // Settings with which the run began that are not the lesson's, as changes at step 0.
  function ownChanges({ lesson, settings }) {
    return ["a", "b"].flatMap((key, model) => {
      const [known, own] = [configOf(LESSONS[lesson][key]), configOf(settings[model])];
      return Object.keys(known).filter((name) => name !== "norm_topk_prob" && known[name] !== own[name])
        .map((name) => ({ model, name, value: own[name], step: 0 }));
    });
  }

  function storyOf({ load, guess, train, pause, goOn, intervene, stop, link, evidence }) {
    const chips = Object.entries(LESSONS).map(([name, { name: words }]) => {
      const chip = action(words, () => load(name), { className: "pg-chip" });
      chip.dataset.lesson = name;
      return chip;
    });
    const title = make("h2");
    const hint = make("p", { className: "pg-hint" });
    const question = make("p", { className: "pg-question", "aria-live": "polite" });
    const result = make("div", { className: "pg-result", role: "status", tabIndex: -1 });
    const status = make("p", { className: "pg-status" });
    const watch = make("p", { className: "pg-watch" });
    const buttons = make("div", { className: "pg-row" });
    const act = make("div", { className: "pg-act" }, result, status, buttons, watch);
    const explain = make("div", { className: "pg-explain", "aria-label": "What the run shows", role: "group" });
    const words = make("dl");
    const glossary = make("details", {}, make("summary", {}, "Words used here"), words);
    const tabs = make("div", { className: "pg-row pg-tabs", role: "group", "aria-label": "Lessons" }, ...chips);
    const ask = make("div", { className: "pg-ask" }, title, hint, question);

    let longest = "";

    const sourceOf = ({ lesson, control }) => (control ? LESSONS[lesson].control : LESSONS[lesson]);
    const changesOf = (state) => [...ownChanges(state), ...state.changes];

    function describe(state) {
      const { name, hint: more, words: used } = LESSONS[state.lesson];
      chips.forEach((chip) => chip.setAttribute("aria-pressed", String(chip.dataset.lesson === state.lesson)));
      const chosen = chips.find((chip) => chip.dataset.lesson === state.lesson);
      tabs.scrollLeft = chosen.offsetLeft - tabs.offsetLeft - 40; // on a phone the row of tabs scrolls
      title.textContent = state.isOwn ? "Your own models" : name;
      hint.textContent = state.isOwn ? `They come from the lesson “${name}”.` : more;
      longest = LESSONS[state.lesson].question;
      const changed = changeWords(changesOf(state));
      const picture = state.isOwn && state.task !== LESSONS[state.lesson].task ? " The picture is another one, too." : "";
      question.textContent = changed || picture ? `${changed}${picture}${state.changes.length ? "" : " Which paints better?"}` : sourceOf(state).question;
      hold();
      watch.textContent = state.tried ? state.tried.watch : state.isOwn ? "Watch both maps and the curve." : sourceOf(state).watch;
      const key = [...used, state.isOwn].join();
      const explained = Object.keys(WORDS).filter((word) => state.isOwn || EVERYWHERE.includes(word) || used.includes(word));
      if (glossary.dataset.key !== key) {
        glossary.dataset.key = key;
        words.replaceChildren(...explained.flatMap((word) => [make("dt", {}, word), make("dd", {}, WORDS[word])]));
      }
    }

    // The room of the lesson's question stays when a shorter sentence takes its place.
    function hold() {
      question.style.setProperty("--longest", "0px");
      const now = question.textContent;
      if (longest !== now) question.textContent = longest;
      const height = question.offsetHeight;
      if (longest !== now) question.textContent = now;
      question.style.setProperty("--longest", `${height}px`);
    }

    function buttonsOf(state) {
      const { tries = [], control } = LESSONS[state.lesson];
      if (state.phase === "seeds") return [action("Stop", stop)];
      if (state.phase === "running") return [action("Pause", pause, { className: "pg-start" })];
      if (state.phase === "paused") return [action("Go on", goOn, { className: "pg-start" })];
      if (state.phase === "ready") {
        if (state.control) return [action("Train", train, { className: "pg-start" })];
        return [make("span", { className: "pg-label" }, "Guess, and training starts:"),
          ...GUESSES.map((one) => action(one, () => guess(one), { className: "pg-guess" })),
          action("Train without a guess", train, { className: "pg-quiet" })];
      }
      const others = state.control || !state.kept ? [] : tries.filter((one) => one !== state.tried);
      const isPlain = !state.tried && !state.isOwn;
      return [
        ...(state.changes.length && !state.tried ? [action("Go on for 1,000 steps", goOn, { className: "pg-start" })] : []),
        ...others.map((one) => action(isPlain ? one.name : `Back to step ${count(state.kept.step)}: ${one.again}`, () => intervene(one), { className: "pg-guess" })),
        ...(control ? [action(state.control ? "Back to the lesson" : control.name, () => load(state.lesson, !state.control, !state.control), { className: "pg-guess" })] : []),
        action("Train again", train, { className: "pg-quiet" }),
      ];
    }

    function verdictWords(state, run) {
      const { verdict, words: ends } = endOf(run);
      const reply = !state.guess ? "" : state.guess === verdict ? " As you guessed." : ` You guessed: ${state.guess}.`;
      return make("p", {}, make("b", {}, `${verdict}.`), ` ${ends}${reply}`);
    }

    function reasons(state, run) {
      const lines = [];
      const plain = !state.isOwn && !state.changes.length;
      if (state.tried || plain) lines.push(valueOf((state.tried ?? sourceOf(state)).look, run));
      state.changes.filter(({ model, step }, n, all) => all.findIndex((one) => one.model === model && one.step === step) === n)
        .forEach(({ model, step }) => lines.push(costWords(NAMES[model], run.points[model], step)));
      lines.push(...spikeWords(run));
      const own = evidence[state.lesson];
      const found = state.control ? own?.control : own;
      const nodes = lines.filter(Boolean).map((line) => make("p", {}, line));
      if (found && plain) nodes.push(make("p", { className: "pg-record" }, recordWords(found, state.seed).join(" ")));
      const { chapter } = LESSONS[state.lesson];
      if (link && !state.isOwn) nodes.push(make("p", {}, make("a", { href: link(chapter) }, `Chapter ${chapter} asks this of a language model`)));
      return nodes;
    }

    // Show a state. Focus that was on a button that goes moves to what comes in its place.
    function tell(state, run) {
      const held = act.contains(act.getRootNode().activeElement);
      describe(state);
      const done = state.phase === "done";
      result.replaceChildren(...(state.seeds ?? (done ? [verdictWords(state, run)] : [])));
      buttons.replaceChildren(...buttonsOf(state));
      watch.hidden = done || Boolean(state.seeds);
      explain.replaceChildren(...(done ? reasons(state, run) : []));
      progress(state, run);
      if (!held) return;
      const next = done ? result : buttons.querySelector("button");
      next.focus({ preventScroll: true });
    }

    function progress(state, run) {
      const isShown = state.phase === "running" || state.phase === "paused";
      status.textContent = isShown ? `${state.phase === "paused" ? "Paused at step" : "Training: step"} ${count(run.steps)} of ${count(run.until)}` : "";
    }

    return { tabs, ask, act, explain, glossary, tell, progress, hold };
  }

  Object.assign(scope.dsmoePlayground, { storyOf });
})(typeof globalThis === "undefined" ? self : globalThis);
