// ---- The text, token by token

// A list with one tab stop; arrows, Home and End move the selection, page keys the layer.
function listbox(prefix, select, stepLayer) {
  const box = make("div", { role: "listbox", tabIndex: 0, className: "dx-tokens" });
  let options = [];
  let selected = 0;

  function onNextLine(direction) { // the nearest option on the line above or below
    const from = options[selected].getBoundingClientRect();
    const distance = (box) => Math.abs(box.left + box.width / 2 - (from.left + from.width / 2));
    let best = selected;
    let lineTop = null;
    for (let i = selected + direction; i >= 0 && i < options.length; i += direction) {
      const to = options[i].getBoundingClientRect();
      if (Math.abs(to.top - from.top) < 3) continue;
      if (lineTop !== null && Math.abs(to.top - lineTop) > 3) break;
      lineTop = to.top;
      if (best === selected || distance(to) < distance(options[best].getBoundingClientRect())) best = i;
    }
    return best;
  }

  box.addEventListener("keydown", (event) => {
    const moves = {
      ArrowLeft: () => selected - 1,
      ArrowRight: () => selected + 1,
      ArrowUp: () => onNextLine(-1),
      ArrowDown: () => onNextLine(1),
      Home: () => 0,
      End: () => options.length - 1,
    };
    if (event.key === "PageUp" || event.key === "PageDown") stepLayer(event.key === "PageUp" ? -1 : 1);
    else if (event.key in moves && options.length) {
      select(Math.min(options.length - 1, Math.max(0, moves[event.key]())));
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  box.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) select(Number(option.dataset.i));
  });

  return {
    box,
    fill(nodes) {
      options = nodes;
      nodes.forEach((node, i) => {
        node.id = `${prefix}-${i}`;
        node.dataset.i = i;
        node.setAttribute("role", "option");
      });
    },
    get options() {
      return options;
    },
    mark(i) {
      options[selected]?.setAttribute("aria-selected", "false");
      selected = i;
      options[i]?.setAttribute("aria-selected", "true");
      if (options[i]) box.setAttribute("aria-activedescendant", options[i].id);
      if (box.matches(":focus")) options[i]?.scrollIntoView({ block: "nearest" });
    },
  };
}

// The text of one model, coloured by the gate of the expert in focus, by the loss or by its change.
function textOf(prefix, act) {
  const tokens = listbox(prefix, act.token, act.stepLayer);
  const legend = make("p", { className: "dx-label dx-legend" });
  const node = make("div", {}, legend, tokens.box);
  let drawn = "";

  function fill(view) {
    const text = JSON.stringify(view.tokens);
    if (text === drawn) return;
    drawn = text;
    const nodes = view.tokens.map((token) => make("span", {}, visible(token)));
    tokens.fill(nodes);
    const lines = [];
    view.tokens.forEach((token, t) => { // keep spaces between words and line breaks
      if (token.startsWith(" ") && t) lines.push(" ");
      lines.push(nodes[t]);
      if (token.endsWith("\n")) lines.push(make("br", { role: "presentation" }));
    });
    tokens.box.replaceChildren(...lines);
  }

  function drawLegend(view, layer, focus, colour, top) {
    const name = `${expertName(view, focus)} of layer ${layer}`;
    legend.replaceChildren(...{
      gate: () => (focus === "shared" || view.dense ? ["Every token uses ", name] : ramp(`Colour: gate of ${name}`, decimal(top))),
      loss: () => ramp("Colour: loss of the token", decimal(top)),
      change: () => ["Colour: change of the loss, ▲ worse, ▼ better; the strongest is ", decimal(top)],
    }[colour]());
  }

  function draw(view, layer, focus, colour, token) {
    const { change } = view;
    const top = Math.max(...{
      gate: () => [1e-6, view.gate_top],
      loss: () => [1e-6, maxAbsolute(view.loss)],
      change: () => [0.1, maxAbsolute(change ?? [])],
    }[colour]());
    drawLegend(view, layer, focus, colour, top);
    tokens.box.classList.toggle("dx-neutral", colour === "loss");
    tokens.box.setAttribute("aria-label", `${view.name}: the text in layer ${layer}`);
    tokens.options.forEach((option, t) => {
      const chosen = view.dense ? [] : choices(view, layer, t);
      const choice = chosen.find(({ expert }) => expert === focus);
      let fill = "";
      let label = chosen.map((one) => `e${one.expert} ${decimal(one.gate)}${one.kept ? "" : " dropped"}`).join(", ");
      if (colour === "gate" && choice) fill = choice.kept ? `dx-s${step(choice.gate / top)}` : "dx-dropped";
      if (colour === "loss" && Number.isFinite(view.loss[t])) {
        fill = `dx-s${step(view.loss[t] / top)}`;
        label += `, loss ${decimal(view.loss[t])}`;
      }
      if (colour === "change" && change && Math.abs(change[t]) >= 0.005) {
        fill = `dx-${change[t] > 0 ? "worse" : "better"} dx-c${Math.ceil((Math.abs(change[t]) / top) * 3)}`;
        label += `, loss ${signed(change[t])}`;
      }
      option.className = `${fill}${choice ? " dx-chosen" : ""}`;
      option.setAttribute("aria-label", `${view.tokens[t].trim() || visible(view.tokens[t])}, ${label || "every token uses the FFN"}`);
    });
    tokens.mark(token);
  }

  return { node, fill, draw };
}
