// ---- Let the models write, token by token

const PAUSE = 140; // ms between two tokens

function writerOf(prefix, state, request, panels, say) {
  const toggle = button("Let it write", () => (running ? stop() : start()), { className: "dx-write" });
  const length = menu("tokens", `${prefix}-length`, { 8: "8", 24: "24", 64: "64" });
  const temperature = menu("temperature", `${prefix}-temperature`, { 0: "0", 0.7: "0.7", 1: "1" });
  length.select.value = "24";
  const node = make("span", { className: "dx-writer" }, toggle, length.node, temperature.node);
  let running = null;

  function stop(forget = false) {
    running = null;
    toggle.textContent = "Let it write";
    if (forget) panels().forEach((panel) => panel.write(null));
  }

  async function start() {
    const mine = (running = {});
    toggle.textContent = "Stop";
    panels().forEach((panel) => panel.write(null));
    const after = state.views.map(() => []);
    const n = Number(length.select.value);
    const atOnce = isCalm() ? n : 1; // without motion the text appears at once
    for (let i = 0; i < n; i += atOnce) {
      const steps = await request({ do: "write", n: atOnce, temperature: Number(temperature.select.value), after });
      if (mine !== running) return;
      if (!steps.length) break;
      steps.forEach((ofModel, v) => ofModel.forEach((step) => {
        after[v].push(step.id);
        panels()[v].write(step);
      }));
      if (atOnce === 1) await wait(PAUSE);
      if (mine !== running) return;
    }
    stop();
    say(panels().map((panel, v) => `${state.views[v].name} wrote: ${panel.written()}`).join(". "));
  }

  return { node, toggle, stop, isWriting: () => running !== null };
}
