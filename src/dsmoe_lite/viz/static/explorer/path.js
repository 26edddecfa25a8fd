// ---- The path of the selected token: ribbons through its experts, layer by layer

const THICK = 44; // px of all gates of a layer together
const PITCH = 20; // px between two experts at least: a line of text
const SHARED_WIDTH = 5; // px: a shared expert has no gate

function pathOf() {
  const caption = make("p", { className: "dx-label" });
  const flow = make("div", { className: "dx-flow" });
  const node = make("div", {}, caption, flow);

  // The experts of one layer with their places: {name, from, at, width, ...}, from the top.
  function placed(view, layer, token) {
    const all = choices(view, layer, token).map((one) => ({ ...one, name: expertName(view, one.expert), width: Math.max(1.5, one.share * THICK) }));
    const shared = { name: "shared", expert: "shared", share: NaN, kept: true, width: SHARED_WIDTH };
    if (view.n_shared && !view.isOff.has(`${layer} shared`)) all.unshift(shared);
    let [at, from] = [0, 0];
    for (const one of all) {
      const pitch = Math.max(PITCH, one.width + 4);
      one.at = at + pitch / 2;
      one.from = from + one.width / 2;
      at += pitch;
      from += one.width;
    }
    return { all, height: at, bundle: from };
  }

  function draw(view, layer, token, focus) {
    const first = Math.max(0, Math.min(layer - 1, view.n_layers - MAX_GRIDS));
    const layers = Array.from({ length: Math.min(MAX_GRIDS, view.n_layers) }, (_, i) => first + i);
    const columns = layers.map((l) => placed(view, l, token));
    const height = Math.max(PITCH, ...columns.map((one) => one.height));
    const next = likely(view, token);
    const says = next.length ? next.reduce((a, b) => (b.p > a.p ? b : a)).word : "next token";
    const drawing = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    for (const [name, value] of Object.entries({ viewBox: `0 0 100 ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" })) {
      drawing.setAttribute(name, value);
    }
    const chips = [];
    columns.forEach(({ all, height: own, bundle }, n) => {
      const [x0, x1] = [(100 * n) / columns.length, (100 * (n + 1)) / columns.length];
      for (const one of all) {
        const y = (height - own) / 2 + one.at;
        const mid = height / 2 - bundle / 2 + one.from;
        const ribbon = document.createElementNS(drawing.namespaceURI, "path");
        ribbon.setAttribute("d", outline(x0, (x0 + x1) / 2, x1, mid, y, one.width / 2));
        const kind = one.expert === "shared" ? "dx-black" : one.kept ? "" : "dx-hollow";
        ribbon.setAttribute("class", kind);
        drawing.append(ribbon);
        const part = Number.isNaN(one.share) || view.dense ? "" : ` ${percent(one.share)}`;
        const device = view.n_devices > 1 && one.expert !== "shared" ? ` d${view.devices[one.expert]}` : "";
        const chip = make("li", { className: `dx-chip ${kind}` }, `${one.name}${part}${one.kept ? "" : " ×"}${device}`);
        if (one.expert === focus && layers[n] === layer) chip.classList.add("dx-focus");
        if (!one.kept) chip.title = "dropped, as the expert was full";
        chip.style.left = `${(x0 + x1) / 2}%`;
        chip.style.top = `${y}px`;
        chips.push([n, chip]);
      }
    });
    const lists = columns.map((_, n) => {
      const list = make("ul", { "aria-label": `layer ${layers[n]}` }, ...chips.filter(([m]) => m === n).map(([, chip]) => chip));
      const head = make("span", { className: "dx-head" }, `layer ${layers[n]}`);
      head.style.left = `${(100 * (n + 0.5)) / columns.length}%`;
      return [head, list];
    });
    const middle = make("div", { className: "dx-ribbons" }, drawing, ...lists.flat());
    middle.style.height = `${height}px`;
    flow.replaceChildren(make("span", { className: "dx-end" }, visible(view.tokens[token])), middle, make("span", { className: "dx-end" }, says));
    const dropped = columns.some(({ all }) => all.some((one) => !one.kept)) ? " Hollow: dropped, as the expert was full." : "";
    const ungated = view.n_shared ? " The shared expert has no gate." : "";
    const what = view.dense ? "every token takes the same way" : "the width of a ribbon is the share of the gates";
    const loss = Number.isFinite(view.loss[token]) ? `loss ${decimal(view.loss[token])}` : "no loss at the start of a window";
    const before = view.before && Number.isFinite(view.before[token]) ? `, ${decimal(view.before[token])} with all experts` : "";
    caption.replaceChildren(make("b", {}, `The path of token ${token}, ${quoted(view.tokens[token])}`), ` (${loss}${before}): ${what}.${ungated}${dropped}`);
  }

  // A ribbon from the bundle at x0 to its own place at xm and back to the bundle at x1; h is half its width.
  function outline(x0, xm, x1, mid, y, h) {
    const [a, b] = [(x0 + xm) / 2, (xm + x1) / 2];
    const top = `M${x0},${mid - h} C${a},${mid - h} ${a},${y - h} ${xm},${y - h} C${b},${y - h} ${b},${mid - h} ${x1},${mid - h}`;
    return `${top} L${x1},${mid + h} C${b},${mid + h} ${b},${y + h} ${xm},${y + h} C${a},${y + h} ${a},${mid + h} ${x0},${mid + h} Z`;
  }

  return { node, draw, summary: () => caption.textContent };
}
