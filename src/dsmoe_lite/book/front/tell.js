// What happened to a model, in words: parts of sentences, true whatever came out.
(function (page) {
  "use strict";

  const { percent, list, facts } = page;
  const N_NAMED = 5; // experts that are off; more are counted
  const mark = ({ word, right }) => `${word}${right ? " ✓" : ""}`;
  const knownOf = (found) => found.filter((one) => one.known).length;
  const quoted = (words) => list(words.map((word) => `“${word}”`));

  // "0 6": expert 6 of layer 0; "1 shared": the shared expert of layer 1
  function nameOf(expert) {
    const [layer, e] = expert.split(" ");
    return `${e === "shared" ? "the shared expert" : `expert ${e}`} of layer ${layer}`;
  }

  const says = ({ first }) => `${mark(first)} (${percent(first.p)})`;

  // How the answer changed; before and now: of Subject.ask.
  function answerChange(before, now) {
    if (now.first.word === before.first.word) {
      return `still ${mark(now.first)} (${percent(now.first.p)}, before ${percent(before.first.p)})`;
    }
    const { first } = before;
    const left = first.right ? `, now ${percent(now.right.p)}` : "";
    return `now ${says(now)}, before ${mark(first)} (${percent(first.p)}${left})`;
  }

  // How the known facts changed; now and was: the answers to all questions, null if they are not counted.
  function factsChange(now, was) {
    if (!now) return "the facts are being counted";
    if (!was) return `${knownOf(now)} of ${facts(now.length)} known`;
    const lost = now.filter((one, n) => was[n].known && !one.known).length;
    const back = now.filter((one, n) => !was[n].known && one.known).length;
    const changes = [...(lost || !back ? [`${facts(lost)} lost`] : []), ...(back ? [`${facts(back)} regained`] : [])];
    return `${changes.join(", ")}, ${knownOf(now)} of ${now.length} known`;
  }

  // The words of the question that an expert works on.
  function workedOn(expert, { words, routes }, isOff) {
    const [layer, e] = expert.split(" ");
    const it = isOff ? "It worked" : "It works";
    if (e === "shared") return `${it} on every word (chapter 05 asks what for)`;
    const own = words.filter((_, t) => routes[t][layer].has(Number(e)));
    return own.length ? `${it} on ${quoted(own)}` : `No word of this question ${isOff ? "was" : "is"} sent to it`;
  }

  // names and off: of each model.
  function stillOff(names, off) {
    const parts = names.flatMap((name, i) => {
      const experts = [...off[i]];
      if (experts.length === 0) return [];
      return [`${name}, ${experts.length > N_NAMED ? `${experts.length} experts` : list(experts.map(nameOf))}`];
    });
    return parts.length ? `Still off: ${parts.join("; ")}.` : "All experts are on.";
  }

  // "Which tool does Ridi Lava have?": Ridi Lava’s tool
  function shortOf(prompt) {
    const [, relation, name] = /^Which (.+) does (.+) have\?$/.exec(prompt) ?? [];
    return name ? `${name}’s ${relation}` : prompt;
  }

  const capital = (words) => `${words.slice(0, 1).toUpperCase()}${words.slice(1)}`;

  Object.assign(page, { mark, knownOf, nameOf, says, answerChange, factsChange, workedOn, stillOff, shortOf, capital });
})(window.dsmoePage);
