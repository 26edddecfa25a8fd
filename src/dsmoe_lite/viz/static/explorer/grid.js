// ---- The experts of one layer: a square each, its area the size of the expert, its fill the share of the gates

const COLUMNS = 16; // at most

// How many squares of each model fit in a row, so that an area is the same number of weights in every model.
function columnsOf(views) {
  const stored = (view) => (view.n_experts + view.n_shared) * (view.expert_size || 1 / (view.n_experts + view.n_shared));
  const largest = Math.max(...views.map(stored));
  const across = views.map((view) => Math.sqrt(largest / (view.expert_size || 1 / (view.n_experts + view.n_shared))));
  const factor = Math.min(2, COLUMNS / Math.max(...across));
  return across.map((one) => ({ wide: Math.max(1, Math.round(factor * one)), narrow: Math.max(1, Math.round(0.75 * factor * one)) }));
}

// One tab stop; arrows move, a click or Space switches the expert off or on.
function gridOf(number, layer, view, columns, act) {
  const experts = [...(view.n_shared ? ["shared"] : []), ...Array.from({ length: view.n_experts }, (_, e) => e)];
  const squares = experts.map((e) => {
    const square = make("button", { type: "button", role: "switch", tabIndex: -1 });
    square.append(make("span", {}, view.dense ? "FFN" : e === "shared" ? "S" : `${e}`), make("i", {}));
    if (e === "shared") square.style.gridColumn = `span ${view.n_shared}`;
    if (e === "shared" && view.n_shared > 1) square.style.aspectRatio = `${view.n_shared}`;
    square.addEventListener("click", () => isDisabled(square) || act.toggle(number, layer, e));
    square.addEventListener("focus", () => act.focus(number, layer, e));
    square.addEventListener("mouseenter", () => act.hover(number, layer, e));
    return square;
  });
  const box = make("div", { className: "dx-experts", role: "group" }, ...squares);
  box.style.setProperty("--wide", columns.wide);
  box.style.setProperty("--narrow", columns.narrow);
  box.setAttribute("aria-label", `${view.name}: experts of layer ${layer}`);
  const node = make("div", {}, make("p", { className: "dx-label" }, `Layer ${layer}`), box);
  box.addEventListener("mouseleave", () => act.hover(number));
  box.addEventListener("keydown", (event) => {
    const at = squares.indexOf(event.target);
    const row = squares.filter((one) => one.offsetTop === squares.at(-1).offsetTop).length;
    const across = squares.length > row ? squares.findIndex((one) => one.offsetTop > squares[0].offsetTop) : squares.length;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across, Home: -at, End: squares.length - 1 - at };
    if (event.key === "PageUp" || event.key === "PageDown") act.stepLayer(event.key === "PageUp" ? -1 : 1);
    else if (event.key in moves) squares[at + moves[event.key]]?.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  // chosen: the experts of the token that is shown, with their shares, of which the strongest fill is `top`.
  function draw(view, chosen, top, focus) {
    const counts = expertCounts(view, layer);
    const most = Math.max(1, ...counts);
    const average = mean(counts) || 1;
    const used = new Map(chosen.map((choice) => [choice.expert, choice]));
    squares.forEach((square, n) => {
      const e = experts[n];
      const isShared = e === "shared";
      const off = view.isOff.has(`${layer} ${e}`);
      const choice = used.get(e);
      const fill = isShared || view.dense ? "dx-always" : !choice ? "" : choice.kept ? `dx-s${step(choice.share / top)}` : "dx-dropped";
      square.className = `${off ? "dx-off" : fill}${e === focus ? " dx-focus" : ""}${isShared ? " dx-shared" : ""}`;
      square.setAttribute("aria-checked", String(!off));
      setDisabled(square, view.dense || !act.canCompute());
      square.tabIndex = e === focus || (!experts.includes(focus) && n === 0) ? 0 : -1;
      square.lastChild.style.width = isShared || view.dense ? "" : `${(counts[e] / most) * 100}%`;
      const device = view.n_devices > 1 && !isShared ? `, device ${view.devices[e]}` : "";
      const part = choice ? `${percent(choice.share)} of the gates${choice.kept ? "" : ", dropped"}` : "not used by this token";
      const load = `${counts[e]} tokens, ${decimal(counts[e] / average)} times the mean load`;
      const what = isShared || view.dense ? "used by every token" : `${part}, ${load}`;
      const name = isShared ? "shared expert" : view.dense ? "FFN" : `expert ${e}`;
      square.setAttribute("aria-label", `${name} of layer ${layer}${device}, ${what}`);
      if (view.n_devices > 1) square.dataset.device = isShared ? "" : view.devices[e] % 8;
    });
  }

  return { node, layer, draw };
}

// What an expert took in this text, in words.
function cardOf(view, layer, expert, likes) {
  const title = make("b", {}, `${expert === "shared" ? "The shared expert" : view.dense ? "The FFN" : `e${expert}`} of layer ${layer}`);
  const off = view.isOff.has(`${layer} ${expert}`) ? " is switched off." : "";
  if (off) return [title, off, expert === "shared" ? "" : " The router chooses among the rest."];
  if (view.dense) return [title, " takes every token. A dense model has no experts to choose from."];
  if (expert === "shared") return [title, " takes every token beside its routed experts. It has no gate."];
  const counts = expertCounts(view, layer);
  const words = wordsOf(view, layer, expert);
  const load = `: ${counts[expert]} of ${view.T} tokens, ${decimal(counts[expert] / (mean(counts) || 1))} times the mean load. `;
  const taken = words.slice(0, 8).map(([text, gate, n]) => `${text}${n > 1 ? ` ×${n}` : ""} ${decimal(gate)}`).join(", ");
  const more = words.length > 8 ? ` and ${words.length - 8} more` : "";
  const what = words.length ? ["It took, most gate first: ", make("span", { className: "dx-words" }, taken), `${more}.`] : ["It took nothing here."];
  const liked = likes?.[`${layer} ${expert}`];
  return [title, load, ...what, liked ? ` It likes ${liked}.` : ""];
}
