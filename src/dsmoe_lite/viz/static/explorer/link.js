// ---- A link that carries what is shown, in the fragment of a page's address: #explorer=0&text=...&off0=0.6,1.shared

// place: the number of this explorer on its page; notebooks have none.
function linkTo(state, place, text) {
  const parts = new URLSearchParams({ explorer: place, text, layer: state.layer, token: state.token });
  state.views.forEach((view, i) => {
    if (view.off.length) parts.set(`off${i}`, view.off.map((pair) => pair.join(".")).join(","));
  });
  return `${window.location.href.split("#")[0]}#${parts}`;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard on file://
    const box = make("textarea", { value: text, className: "dx-spoken" });
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
}

// Show what the address asks for; return in one line what it asks for in vain.
async function follow(state, place, ask, setTrait) {
  const given = new URLSearchParams(window.location.hash.slice(1));
  if (given.get("explorer") !== String(place)) return "";
  const unknown = [];
  const text = given.get("text");
  if (text !== null && text !== state.text()) {
    if (await ask({ do: "route", text })) unknown.push("this text");
  }
  const off = state.views.map((view, i) => (given.get(`off${i}`) || "").split(",").filter(Boolean).flatMap((one) => {
    const [, layer, expert] = /^(\d+)\.(\d+|shared)$/.exec(one) || [];
    const exists = Number(layer) < view.n_layers && !view.dense && (expert === "shared" ? view.n_shared > 0 : Number(expert) < view.n_experts);
    if (!exists) unknown.push(`expert ${one}`);
    return exists ? [[Number(layer), expert === "shared" ? expert : Number(expert)]] : [];
  }));
  if (off.some((pairs) => pairs.length) && (await ask({ do: "off", off }))) unknown.push("so many experts switched off");
  for (const [name, n] of [["layer", Math.max(...state.views.map((view) => view.n_layers))], ["token", state.views[0].T]]) {
    const value = given.get(name);
    if (value === null) continue;
    if (/^\d+$/.test(value) && Number(value) < n) setTrait(name, Number(value));
    else unknown.push(`${name} ${value.slice(0, 20)}`);
  }
  return unknown.length ? `The link asks for ${listed(unknown.slice(0, 4))}, which cannot be shown; the rest is here.` : "";
}
