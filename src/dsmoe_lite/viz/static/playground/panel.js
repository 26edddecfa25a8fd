// One of the two models: its name and size, what it paints, who paints what, and a card for each expert.
(function (scope) {
  "use strict";

  const { make, action, drawTiles, drawTexture, drawChoices, colorOf, NAMES, count, percent, plural, crowdWords } = scope.dsmoePlayground;
  const MOST = 3; // equal shares that fill the bar under a card

  function titleOf(name, { n_routed_experts: E, top_k: K, n_shared_experts: S, balance, bias_speed: bias, capacity_factor: capacity }) {
    const parts = [`${K} of ${E} experts`];
    if (S) parts.push(`${S} shared`);
    if (balance) parts.push(`balance loss ${balance}`);
    if (bias) parts.push(`bias speed ${bias}`);
    if (!balance && !bias) parts.push("no balancing");
    if (capacity) parts.push(`capacity ${capacity}`);
    return `${name}: ${parts.join(", ")}`;
  }

  // toggle(e): switch an expert off or on; colour(name): of a variable of the CSS.
  function panelOf(i, { toggle, colour }) {
    const name = NAMES[i];
    const title = make("h3");
    const size = make("p", { className: "pg-muted pg-size" });
    const error = make("b", { className: "pg-error" });
    const without = make("span");
    const facts = make("p", { className: "pg-facts" });
    const picture = make("canvas", { role: "img" });
    const choices = make("canvas", { role: "img" });
    const caption = make("figcaption");
    const strip = make("div", { className: "pg-experts", role: "toolbar", "aria-label": `Experts of ${name}: arrow keys move, Enter switches an expert off` });
    const always = make("div", { className: "pg-always" });
    const node = make("section", { className: `pg-panel pg-${name.toLowerCase()}`, "aria-label": `Model ${name}` },
      title, size,
      make("div", { className: "pg-pair" },
        make("figure", {}, picture, make("figcaption", {}, "What it paints")),
        make("figure", {}, choices, caption)),
      make("p", { className: "pg-line" }, error, without), facts);
    const deck = make("section", { className: `pg-panel pg-${name.toLowerCase()}`, "aria-label": `Experts of model ${name}` },
      make("h3", {}, `${name}'s experts`), always, strip);
    let [cards, shared, run, focus] = [[], null, null, null];

    // The tab key reaches one card; arrows reach the others.
    function moveTo(e) {
      const to = (e + cards.length) % cards.length;
      cards.forEach(({ card }, n) => (card.tabIndex = n === to ? 0 : -1));
      cards[to].card.focus();
    }

    strip.addEventListener("keydown", (event) => {
      const at = cards.findIndex(({ card }) => card === event.target);
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: cards.length - 1 }[event.key];
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      moveTo(to);
    });

    function point(e) {
      focus = e;
      drawMap();
    }

    // Show the models of a new run.
    function build(of) {
      [run, focus] = [of, null];
      const model = run.models[i];
      cards = Array.from({ length: model.config.n_routed_experts }, (_, e) => {
        const [texture, load] = [make("canvas"), make("i")];
        const card = action(texture, () => toggle(e), { className: "pg-expert", tabIndex: e ? -1 : 0 });
        card.append(make("span", { className: "pg-load" }, load), make("small", {}, `e${e}`));
        card.style.setProperty("--own", colorOf(e));
        for (const event of ["mouseenter", "focus"]) card.addEventListener(event, () => point(e));
        for (const event of ["mouseleave", "blur"]) card.addEventListener(event, () => point(null));
        return { card, texture, load };
      });
      strip.replaceChildren(...cards.map(({ card }) => card));
      shared = model.shared && make("canvas", { role: "img", "aria-label": `What the shared experts of ${name} paint on every tile` });
      always.hidden = !shared;
      const n = model.config.n_shared_experts;
      if (shared) always.replaceChildren(shared, make("span", {}, `${plural(n, "shared expert")}: ${n === 1 ? "it paints" : "together they paint"} this on every tile (the band on each tile of the map).`));
    }

    function drawMap() {
      const view = run.views[i];
      const tiles = focus === null ? [] : view.tiles.filter(({ ids }) => ids.includes(focus));
      const only = tiles.length ? focus : null; // for an idle expert all stays as it is
      drawChoices(choices, view, run.task.side, only, { idle: colour("--pg-grid"), gap: colour("--pg-card"), ink: colour("--pg-ink") });
      const several = run.models[i].config.top_k > 1 ? " (width: share)" : "";
      caption.textContent = focus === null ? `Who paints which tile${several}` : `e${focus} paints ${tiles.length ? plural(tiles.length, "tile") : "no tile"}`;
    }

    function draw() {
      const [view, model] = [run.views[i], run.models[i]];
      const { tiles, textures, error: found, loads, common } = view;
      const off = [...model.off].sort((a, b) => a - b);
      title.textContent = titleOf(name, model.config);
      const inRouter = model.router.values.length;
      const units = (model.config.top_k + model.config.n_shared_experts) * model.config.expert_width;
      size.textContent = `${count(model.nWeights - inRouter)} weights in experts, ${count(inRouter)} in the router; a token uses ${units} units`;
      drawTiles(picture, tiles.map(({ painted }) => painted), run.task.side);
      drawMap();
      error.textContent = percent(found);
      without.textContent = ` unexplained${off.length ? `, without ${off.map((e) => `e${e}`).join(", ")}` : ""}`;
      const words = model.steps || off.length ? [crowdWords(view, model.config.capacity_factor !== null, off.length === 0)] : ["Not trained yet."];
      if (common && model.steps) words.push(`Common wave in its ${shared ? "chosen " : ""}experts: ${percent(common.routed)}${shared ? `, in the shared: ${percent(common.shared)}` : ""}.`);
      facts.textContent = words.join(" ");
      picture.setAttribute("aria-label", `What ${name} paints: ${percent(found)} of the picture unexplained`);
      choices.setAttribute("aria-label", `${new Set(tiles.flatMap(({ ids }) => ids)).size} of ${textures.length} experts paint the ${tiles.length} tiles`);
      if (shared) drawTexture(shared, view.shared);
      cards.forEach(({ card, texture, load }, e) => {
        drawTexture(texture, textures[e]);
        load.style.height = `${Math.min(100, (100 / MOST) * loads[e])}%`;
        const n = tiles.filter(({ ids }) => ids.includes(e)).length;
        const isOff = model.off.has(e);
        card.setAttribute("aria-pressed", String(isOff));
        card.classList.toggle("pg-idle", n === 0);
        card.title = isOff ? `e${e}: switched off` : n ? `e${e}: ${plural(n, "tile")}, ${loads[e].toFixed(1)} times an equal share` : `e${e}: idle, no tile`;
        card.setAttribute("aria-label", card.title);
      });
    }

    return { node, deck, choices, build, draw };
  }

  Object.assign(scope.dsmoePlayground, { panelOf });
})(typeof globalThis === "undefined" ? self : globalThis);
