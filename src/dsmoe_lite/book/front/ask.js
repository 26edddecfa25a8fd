// One of the two models: what it answers, which experts its routers pick, what it still knows.
(function (page) {
  "use strict";

  const N_SHOWN = 3; // likeliest answers
  const SLICE = 30; // ms of counting at a stretch: the page stays alive
  const MOST_WRITTEN = 48; // tokens; a text ends at the first full stop after half of them

  // A token as a reader sees it; some tokens are single bytes of a character.
  function wordOf(tokenizer, id) {
    if (id === 0) return "(end)";
    const text = tokenizer.decode([id]).trim();
    if (text && /^[^\p{C}\uFFFD]+$/u.test(text)) return /[\p{L}\p{N}]/u.test(text) ? text : `“${text}”`;
    const bytes = Array.from(tokenizer.vocabulary[id], (letter) => tokenizer.bytes.get(letter));
    const space = bytes.every((byte) => byte === 32 || (byte > 8 && byte < 14));
    return space ? "∙" : `byte ${bytes.map((byte) => byte.toString(16)).join(" ")}`;
  }

  const keyOf = (off) => [...off].sort().join(",");

  class Subject {
    // questions: [prompt, answer] each.
    constructor(name, model, questions) {
      Object.assign(this, { name, model, moe: model.config.moe });
      this.questions = questions.map(([prompt, answer]) => {
        const { ids, pieces } = model.tokenizer.encode(prompt);
        return { ids, words: pieces.map((piece) => piece.trim()), right: model.tokenizer.encode(answer).ids[0] };
      });
      this.counts = new Map(); // experts that are off -> the answer to each question asked so far
    }

    word(id) {
      return wordOf(this.model.tokenizer, id);
    }

    // shown: the likeliest answers with the right one; first and right: two of them; routes: of each word, of each
    // layer, the picked experts with their shares of what all picked ones contribute.
    ask(n, off) {
      const { ids, words, right } = this.questions[n];
      const { logits, routings } = this.model.forward(ids, { off });
      const p = this.model.distribution(logits, 1);
      const best = Array.from(p.keys()).sort((a, b) => p[b] - p[a]).slice(0, N_SHOWN);
      if (!best.includes(right)) best[N_SHOWN - 1] = right;
      const answer = (id) => ({ word: this.word(id), p: p[id], right: id === right });
      const routes = ids.map((_, t) => routings.map((routing) => this.shares(routing, t)));
      return { shown: best.map(answer), first: answer(best[0]), right: answer(right), words, routes };
    }

    // Token t of a routing: expert -> share.
    shares({ ids, gates }, t) {
      const K = this.moe.top_k;
      const own = Array.from(gates.subarray(t * K, (t + 1) * K));
      const sum = own.reduce((a, b) => a + b, 0) || 1;
      return new Map(own.map((gate, k) => [ids[t * K + k], gate / sum]));
    }

    // Of the experts at the last word, the one without which the right answer is least likely.
    mostNeeded(n, off) {
      const picked = this.ask(n, off).routes.at(-1);
      const candidates = picked.flatMap((shares, layer) => [...shares.keys()].map((e) => `${layer} ${e}`));
      const left = (expert) => this.ask(n, new Set([...off, expert])).right.p;
      return candidates.map((expert) => [left(expert), expert]).sort((a, b) => a[0] - b[0])[0][1];
    }

    // The answers to all questions if they were counted with these experts off: {id, known} each.
    counted(off) {
      const found = this.counts.get(keyOf(off));
      return found && found.length === this.questions.length ? found : null;
    }

    // Ask all questions, show(answers so far) now and then; go on where an earlier count of the same experts stopped.
    async count(off, show, stopped) {
      const found = this.counts.get(keyOf(off)) ?? [];
      this.counts.set(keyOf(off), found);
      while (found.length < this.questions.length) {
        for (const until = performance.now() + SLICE; performance.now() < until && found.length < this.questions.length; ) {
          found.push(this.answer(found.length, off));
        }
        show(found);
        await page.wait();
        if (stopped()) return;
      }
      show(found);
    }

    answer(n, off) {
      const { ids, right } = this.questions[n];
      const { logits } = this.model.forward(ids, { off });
      const last = logits.subarray(logits.length - this.model.config.vocab_size);
      const id = last.indexOf(last.reduce((a, b) => Math.max(a, b)));
      return { id, known: id === right };
    }

    // Continue question n: yield {text, read, routes}, the new text, the word that was read for it and its experts.
    *write(n, off) {
      const { ids, words } = this.questions[n];
      let read = words.at(-1);
      let written = 0;
      for (const { id, routings } of this.model.generate(ids, MOST_WRITTEN, { off })) {
        if (id === 0) return; // the document ends
        const text = this.model.tokenizer.decode([id]);
        const routes = routings.map((routing) => this.shares(routing, routing.ids.length / this.moe.top_k - 1));
        written += 1;
        yield { text, read, routes };
        if (text.endsWith(".") && written >= MOST_WRITTEN / 2) return;
        read = this.word(id);
      }
      yield { text: " …", read, routes: null };
    }
  }

  Object.assign(page, { Subject });
})(window.dsmoePage);
