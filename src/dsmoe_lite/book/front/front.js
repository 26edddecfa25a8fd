// The front page: ask two trained models a question, switch experts off, and see what is still known.
(function (page) {
  "use strict";

  const { questions, models: described } = window.dsmoeFront; // [prompt, answer] each; {name, weights, config} each
  const { make, wait, list, facts, mark, knownOf, nameOf, says, answerChange, factsChange, workedOn, capital } = page;
  const N_CHIPS = 6;
  const WRITING = 150; // ms per word
  const HINT =
    "Click a square to switch that expert off, or let a button choose one. Click a word of the question to see where it is sent.";
  const root = document.getElementById("lab");
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  const names = described.map(({ name }) => name);
  const prompts = questions.map(([prompt]) => prompt);
  const nothing = new Set();
  const state = { question: 0, word: -1, off: described.map(() => nothing) }; // off: "layer expert", "layer shared"
  const say = make("p", { className: "say", role: "status" });
  const tally = make("p", { className: "tally" });
  const asked = make("div", { className: "words", role: "group", "aria-label": "Words of the question" });
  let subjects = [];
  let panels = [];
  let turn = 0; // counts what a reader did; what still runs for an earlier turn stops

  function load({ name, weights, config }) {
    return new Promise((resolve, reject) => {
      const node = make("script", { src: `${window.dsmoeModelFolder}${weights}.js` });
      node.onload = () => {
        const packed = { ...window.dsmoeModels[weights], config };
        resolve(dsmoeEngine.read(packed).then((model) => new page.Subject(name, model, questions)));
      };
      node.onerror = () => reject(new Error("The models are missing from this copy of the book."));
      document.head.append(node);
    });
  }

  // ---- Asking, drawing, counting

  const answerOf = (i, off = state.off[i]) => subjects[i].ask(state.question, off);
  const countedOf = (i, off = state.off[i]) => subjects[i].counted(off);

  // Draw everything and count. tell(): what happened; told again when more is counted.
  async function show(tell) {
    const mine = (turn += 1);
    const stopped = () => mine !== turn;
    const report = () => {
      if (say.textContent !== tell()) say.textContent = tell();
    };
    panels.forEach((panel) => {
      panel.write();
      panel.showFact();
      panel.lose();
    });
    draw();
    chips.forEach((chip, n) => chip.setAttribute("aria-pressed", String(n === state.question)));
    writeAddress();
    report();
    const count = (i) => subjects[i].count(state.off[i], (found) => showCount(i, found), stopped);
    await Promise.all(subjects.map((_, i) => count(i)));
    if (stopped()) return;
    report();
    await Promise.all(subjects.map((subject) => subject.count(nothing, () => {}, stopped))); // to compare with
    if (!stopped()) report();
  }

  // The answers, and the experts of one word; the last word's give the answer.
  function draw() {
    const said = subjects.map((_, i) => answerOf(i));
    const { words } = said[0];
    const at = state.word < 0 ? words.length - 1 : state.word;
    panels.forEach((panel, i) => panel.draw(state.question, said[i], at, state.off[i]));
    if (asked.dataset.question !== String(state.question)) {
      asked.dataset.question = state.question;
      asked.replaceChildren(...words.map((word, n) => action(word, () => follow(n))));
    }
    [...asked.children].forEach((word, n) => word.setAttribute("aria-pressed", String(n === at)));
  }

  function showCount(i, found) {
    panels[i].showCount(found, prompts);
    const known = names.map((name, k) => {
      const counted = countedOf(k);
      return make("span", {}, `${name} `, make("b", {}, counted ? String(knownOf(counted)) : "…"));
    });
    tally.replaceChildren("knows: ", ...known, `of ${questions.length} facts`);
  }

  // One fact in words, below the strip that a reader points at.
  function point(i, n) {
    const [prompt, answer] = questions[n];
    const answers = names.map((name, k) => {
      const { [n]: found } = countedOf(k) ?? [];
      return found ? `${name} says ${mark({ word: subjects[k].word(found.id), right: found.known })}` : `${name} is being asked`;
    });
    const ask = action("Ask it", () => askAbout(n));
    panels[i].showFact(n, make("span", {}, `${prompt}${answer}. ${list(answers)}. `), ask);
  }

  // ---- What a reader does

  // Show where a word of the question is sent.
  function follow(n) {
    state.word = n;
    const { words } = answerOf(0);
    const last = n === words.length - 1;
    const why = last ? "What its experts add decides the answer" : `The answer comes after the last word, “${words.at(-1)}”`;
    show(() => `The lines show where the routers send “${words[n]}”. ${why}.`);
    panels.forEach((panel) => panel.resetStops());
  }

  function askAbout(n) {
    [state.question, state.word] = [n, -1];
    show(() => `${answers()} ${standing()}`);
    panels.forEach((panel) => panel.resetStops());
  }

  const answers = () => `${list(names.map((name, i) => `${name} says ${says(answerOf(i))}`))}.`;

  // The experts that are off and what that costs.
  function standing() {
    const off = page.stillOff(names, state.off);
    const costs = names.flatMap((name, i) => {
      const [now, all] = [countedOf(i), countedOf(i, nothing)];
      if (!state.off[i].size || !now || !all) return [];
      return [`${name} knows ${knownOf(now)} of ${facts(now.length)}, with all experts ${knownOf(all)}`];
    });
    return costs.length ? `${off} ${costs.join("; ")}.` : off;
  }

  function toggle(i, expert) {
    const { top_k: K, n_routed_experts: E } = subjects[i].moe;
    const [old, off] = [state.off[i], new Set(state.off[i])];
    if (!off.delete(expert)) off.add(expert);
    const inLayer = (one) => one.startsWith(`${expert.split(" ")[0]} `) && !one.endsWith("shared");
    const left = E - [...off].filter(inLayer).length;
    if (left < K) {
      const why = `The router picks ${K} experts for every word, and only ${left} would be left.`;
      say.textContent = `${names[i]}: ${nameOf(expert)} stays on. ${why}`;
      return;
    }
    const before = answerOf(i);
    state.off[i] = off;
    const now = answerOf(i);
    const isOff = off.has(expert);
    const worked = workedOn(expert, isOff ? before : now, isOff);
    const event = `${names[i]}: ${nameOf(expert)} is ${isOff ? "off" : "on again"}. ${worked}.\nThe answer: ${answerChange(before, now)}.`;
    show(() => {
      const change = factsChange(countedOf(i), countedOf(i, old) ?? countedOf(i, nothing));
      const others = worked.startsWith("No word") && /^\d+ facts? lost/.test(change);
      return `${event} ${capital(change)}.${others ? " Other questions are sent to it." : ""}`;
    });
  }

  // Switch off n of the experts that this answer needs most, the neediest first, in every model; n per model.
  function breakMost(numbers) {
    const before = names.map((_, i) => answerOf(i, nothing));
    const broken = numbers.map((n, i) => {
      const off = new Set();
      for (let k = 0; k < n; k += 1) off.add(subjects[i].mostNeeded(state.question, off));
      state.off[i] = off;
      return [...off];
    });
    state.word = -1;
    const one = numbers[0] === numbers[1];
    const { words } = before[0];
    const what = one
      ? `One expert is off in each model, the one picked at “${words.at(-1)}” that this answer needs most. All others are on.`
      : `One large expert and four small ones (as many weights) are off, picked one after another. All others are on.`;
    show(() => {
      const found = names.map((name, i) => {
        const expert = broken[i].length === 1 ? `, ${nameOf(broken[i][0])}` : "";
        const change = factsChange(countedOf(i), countedOf(i, nothing));
        return `${name}${expert}: ${answerChange(before[i], answerOf(i))}. ${capital(change)}.`;
      });
      return [what, ...found].join("\n");
    });
    const [found] = panels.map((panel, i) => {
      panel.resetStops();
      return broken[i].map((expert) => panel.find(expert))[0];
    });
    found.scrollIntoView({ block: "nearest", behavior: calm.matches ? "auto" : "smooth" });
  }

  function allOn() {
    state.off = described.map(() => nothing);
    show(() => `All experts are on again. ${answers()}`);
  }

  // Both models go on from the question. Afterwards the squares are the question's again.
  async function write() {
    state.word = -1;
    let event = "Both models go on writing from the question. What they write need not be true.";
    show(() => event);
    const mine = turn;
    const { words } = answerOf(0);
    const writers = subjects.map((subject, i) => subject.write(state.question, state.off[i]));
    panels.forEach((panel) => panel.write(make("b", {}, prompts[state.question])));
    for (let left = writers.length; left > 0; ) {
      left = 0;
      writers.forEach((writer, i) => {
        const { value } = writer.next();
        if (!value) return;
        left += 1;
        panels[i].written.append(value.text);
        if (value.routes && !calm.matches) panels[i].drawRoutes(value.read, value.routes, state.off[i]);
      });
      if (!calm.matches) await wait(WRITING);
      if (mine !== turn) return;
    }
    draw();
    event = `Both models went on from the question. What they wrote need not be true. The squares are those of “${words.at(-1)}” again.`;
    say.textContent = event;
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
    state.word = -1;
    state.off = subjects.map(({ moe, model }, i) => {
      const { n_routed_experts: E, n_shared_experts: shared, top_k: K } = moe;
      const exists = (expert) => {
        const [, layer, e] = /^(\d)\.(\d+|shared)$/.exec(expert) || [];
        return layer < model.nMoeLayers && (e === "shared" ? shared > 0 : e < E);
      };
      const off = (given.get(`off${i}`) || "").split(",").filter(exists).map((expert) => expert.replace(".", " "));
      return new Set(off.slice(0, E - K)); // what is left is enough for a word
    });
  }

  function action(words, act) {
    const button = make("button", { type: "button" }, words);
    button.addEventListener("click", act);
    return button;
  }

  const chips = prompts.slice(0, N_CHIPS).map((prompt, n) => {
    const chip = action(page.shortOf(prompt), () => askAbout(n));
    chip.className = "chip";
    return chip;
  });

  function begin() {
    readAddress();
    show(() => (state.off.some((off) => off.size) ? `${answers()} ${standing()}` : HINT));
    panels.forEach((panel) => panel.resetStops());
  }

  async function start() {
    root.replaceChildren(make("p", { role: "status" }, "Loading two models, 5 MB …"));
    try {
      subjects = await Promise.all(described.map(load));
    } catch (error) {
      root.replaceChildren(make("p", { role: "status" }, `${error.message} The chapters below need none of this.`));
      return;
    }
    panels = subjects.map((subject, i) =>
      page.panelOf(subject, { onSwitch: (expert) => toggle(i, expert), onAsk: askAbout, onPoint: (n) => point(i, n) }));
    const actions = [
      action("Break what this answer needs most", () => breakMost([1, 1])),
      action("Break one large, four small", () => breakMost([1, 4])),
      action("Let them write", write),
      action("All on again", allOn),
    ];
    const entry = (kind, words) => make("li", {}, make("i", { className: kind }), words);
    const legend = make("ul", { className: "legend" },
      entry("strong", "picked (stronger: larger share)"), entry("idle", "not picked"),
      entry("shared", "shared: on for every word"), entry("off", "switched off"), make("li", {}, "✓ the true answer"));
    root.replaceChildren(
      make("div", { className: "row chips", role: "group", "aria-label": "Questions" }, ...chips),
      make("div", { className: "row actions" }, ...actions),
      make("div", { className: "report" }, say, tally),
      make("div", { className: "question" }, asked, legend),
      make("div", { className: "panels" }, ...panels.map(({ node }) => node)),
    );
    begin();
  }

  window.addEventListener("hashchange", begin);
  start();
})(window.dsmoePage);
