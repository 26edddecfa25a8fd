// ---- What the model says after the selected token

function answersOf() {
  const caption = make("p", { className: "dx-label" });
  const rows = make("ol", { className: "dx-answers" });
  const node = make("div", {}, caption, rows);

  function draw(view, token) {
    const found = likely(view, token);
    node.hidden = !found.length;
    const ghost = view.before_p ? " Thin mark: with all experts." : "";
    caption.textContent = `What comes after ${quoted(view.tokens[token])}?${ghost}`;
    rows.replaceChildren(...found.map(({ word: said, p, before, right }) => {
      const bar = make("i", {});
      bar.style.width = `${100 * p}%`;
      const track = make("span", { className: "dx-track" }, bar);
      if (Number.isFinite(before)) {
        const mark = make("b", {});
        mark.style.left = `${100 * before}%`;
        track.append(mark);
      }
      const was = Number.isFinite(before) ? make("small", {}, ` was ${percent(before)}`) : "";
      const sign = right ? make("span", { title: "the right one" }, " ✓") : "";
      if (right) sign.append(make("span", { className: "dx-spoken" }, "right"));
      const row = make("li", {}, make("span", { className: "dx-said" }, said, sign), track);
      row.append(make("span", { className: "dx-p" }, percent(p), was));
      row.classList.toggle("dx-right", right);
      return row;
    }));
  }

  return { node, draw };
}

// Compare with all experts, in words: “nena” goes from 98% to 4%, and the model now says “duli” (43%).
function whatChanged(view, token) {
  const found = likely(view, token);
  if (!found.length) return "";
  const first = found.reduce((a, b) => (b.p > a.p ? b : a));
  const usual = found.reduce((a, b) => (b.before > a.before ? b : a));
  const meant = found.find(({ right }) => right) ?? usual;
  const was = Number.isFinite(meant.before) ? meant.before : meant.p;
  const moved = percent(was) === percent(meant.p) ? `stays at ${percent(was)}` : `goes from ${percent(was)} to ${percent(meant.p)}`;
  return `“${meant.word}” ${moved}${first === meant ? "" : `, and the model now says “${first.word}” (${percent(first.p)})`}`;
}
