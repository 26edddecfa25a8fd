// ---- Guided discoveries: a click each, and a sentence computed from what came out

function discoveriesOf(state, ask, show) {
  const last = () => state.views[0].T - 1;
  const named = (view, pair) => `${expertName(view, pair.split(" ")[1] === "shared" ? "shared" : Number(pair.split(" ")[1]))} of layer ${pair.split(" ")[0]}`;

  async function breakMost() {
    const before = state.views.map((view) => view.isOff);
    if (await ask({ do: "break" })) return;
    const broken = state.views.map((view, i) => [...view.isOff].find((pair) => !before[i].has(pair)));
    const found = state.views.flatMap((view, i) => {
      if (view.dense) return [];
      if (!broken[i]) return [`${view.name} can spare no further expert`];
      return [`${view.name} without ${named(view, broken[i])}: ${whatChanged(view, last())}`];
    });
    const places = broken.map((pair) => pair?.split(" ").map(Number));
    const layer = places.find(Boolean)?.[0] ?? state.layer;
    const focus = places.map((place, i) => place?.[1] ?? state.focus[i]);
    state.onShared = [];
    show(`${found.join(". ")}.`, { token: last(), layer, focus });
  }

  async function sharedNeeded() {
    const off = state.views.map((view) => {
      const shared = view.n_shared ? Array.from({ length: view.n_layers }, (_, l) => [l, "shared"]) : [];
      return [...view.off.filter(([, expert]) => expert !== "shared"), ...shared];
    });
    if (await ask({ do: "off", off })) return;
    const found = state.views.filter((view) => view.n_shared).map((view) => {
      const change = mean(Array.from(view.loss)) - mean(Array.from(view.before));
      const loss = Number.isFinite(change) ? `; the mean loss of the text changes by ${signed(change)}` : "";
      return `${view.name} without its shared expert, in all layers: ${whatChanged(view, last())}${loss}`;
    });
    show(`${found.join(". ")}.`, { token: last() });
  }

  // Two places of one token whose experts differ most in some layer: {view, layer, first, second, both}; null if none.
  function sameWord() {
    let best = null;
    for (const view of state.views.filter((one) => !one.dense)) {
      const seen = new Map();
      view.tokens.forEach((token, second) => {
        for (const first of visible(token) === "∙" ? [] : seen.get(token) ?? []) {
          for (let layer = 0; layer < view.n_layers; layer += 1) {
            const [one, other] = [first, second].map((t) => choices(view, layer, t).map(({ expert }) => expert));
            const both = one.filter((e) => other.includes(e)).length;
            const differ = Math.max(one.length, other.length) - both;
            const share = both / (Math.max(one.length, other.length) || 1);
            if (differ && (!best || share <= best.share)) best = { view, layer, first, second, both, share, one, other };
          }
        }
        seen.set(token, [...(seen.get(token) ?? []), second]);
      });
    }
    return best;
  }

  function* sentences() { // two questions with the first one answered
    for (const [prompt, answer] of state.questions) {
      for (const [other] of state.questions) if (other !== prompt) yield `${prompt}${answer}. ${other}`;
    }
  }

  async function sameWordElsewhere() {
    let found = sameWord();
    const loaded = !found;
    for (const text of found ? [] : sentences()) {
      if (await ask({ do: "route", text })) return;
      found = sameWord();
      if (found) break;
    }
    if (!found) {
      show("No token of this text occurs twice with different experts.", {});
      return;
    }
    const { view, layer, first, second, both, one, other } = found;
    const names = (experts) => listed(experts.map((e) => `e${e}`));
    const details = one.length > 3 ? `only ${both} of ${one.length} experts are the same` : `first to ${names(one)}, then to ${names(other)}`;
    const where = `${quoted(view.tokens[second])} is token ${first} and token ${second}. In layer ${layer}, ${view.name} sends it`;
    const what = one.length > 3 ? `${where} to other experts the second time: ${details}.` : `${where} ${details}.`;
    show(`${loaded ? "Here is a text with such a word. " : ""}${what}`, { token: second, layer });
  }

  return { breakMost, sharedNeeded, sameWordElsewhere };
}
