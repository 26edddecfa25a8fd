// ---- One model: what it says, the text, its experts and the selected token's path through them

function panelOf(number, prefix, state, act) {
  const name = make("p", { className: "dx-name" });
  const answers = answersOf();
  const text = textOf(`${prefix}-t${number}`, act);
  const layers = make("div", { className: "dx-layers" });
  const legend = make("p", { className: "dx-label dx-legend" });
  const card = make("p", { className: "dx-card" });
  const path = pathOf();
  const losses = make("p", { className: "dx-losses" });
  const written = make("p", { className: "dx-written" });
  const node = make("section", { className: "dx-panel" }, name, answers.node, text.node, written, layers, legend, card, path.node, losses);
  let view = null;
  let grids = [];
  let shape = "";

  function fill() {
    view = state.views[number];
    node.setAttribute("aria-label", view.name);
    node.style.setProperty("--dx-model", `var(--dx-${state.colours[number] ?? "line1"}_label)`);
    const shared = view.n_shared ? `, ${view.n_shared} shared` : "";
    const upTo = view.ids.includes(NONE) ? "up to " : "";
    const size = view.dense ? "one FFN per layer, always used" : `${upTo}${view.top_k} of ${view.n_experts} experts per token${shared}`;
    name.replaceChildren(view.name, make("small", {}, size));
    text.fill(view);
  }

  function fillGrids() {
    const shown = shownLayers(view, state.layer);
    const now = JSON.stringify([shown, view.n_experts, view.n_shared, view.dense, view.name]);
    if (now === shape) return;
    shape = now;
    grids = shown.map((l) => gridOf(number, l, view, state.columns[number], act));
    layers.replaceChildren(...grids.map((grid) => grid.node));
  }

  // step: the experts of each layer that write the next token; without it those of the selected token.
  function drawGrids(focus, layer, step) {
    const chosen = grids.map((grid) => (step && !view.dense ? step[grid.layer] : choices(view, grid.layer, state.token)));
    const top = Math.max(1e-6, ...chosen.flat().map((choice) => choice.share));
    grids.forEach((grid, i) => grid.draw(view, chosen[i], top, grid.layer === layer ? focus : null));
    legend.hidden = view.dense;
    legend.replaceChildren(...ramp("Fill: share of the token's gates", percent(top)), " · bar: load in this text");
  }

  function draw() {
    if (view !== state.views[number]) fill();
    fillGrids();
    const layer = Math.min(state.layer, view.n_layers - 1);
    const focus = act.focusOf(number);
    const { hover } = state;
    const at = hover && hover.number === number ? hover : { layer, expert: focus };
    answers.draw(view, state.token);
    text.draw(view, at.layer, at.expert, state.shade, state.token);
    drawGrids(focus, layer, null);
    card.replaceChildren(...cardOf(view, at.layer, at.expert, state.likes[view.name]));
    path.draw(view, layer, state.token, focus);
    const loss = mean(Array.from(view.loss));
    const change = view.before ? `, ${signed(loss - mean(Array.from(view.before)))} from the experts switched off` : "";
    losses.textContent = Number.isFinite(loss) ? `Mean loss of the text: ${decimal(loss)}${change}` : "";
  }

  // Forget what was written, or add a token of {word, experts: [[expert, gate, kept], ...] per layer}.
  function write(step) {
    if (!step) {
      written.replaceChildren();
      return;
    }
    if (!written.childNodes.length) written.append(make("b", {}, `${view.tokens.slice(-6).join("")}`));
    written.append(step.word === "" ? " ¶" : step.word);
    const all = step.experts.map((one) => withShares(one.map(([expert, gate, kept]) => ({ expert, gate, kept }))));
    if (!isCalm()) drawGrids(act.focusOf(number), Math.min(state.layer, view.n_layers - 1), all);
  }

  function summary() {
    const [first] = likely(view, state.token).sort((a, b) => b.p - a.p);
    return first ? `${view.name} says ${first.word}, ${percent(first.p)}` : `${view.name}: ${path.summary()}`;
  }

  return { node, draw, write, summary, written: () => written.textContent };
}
