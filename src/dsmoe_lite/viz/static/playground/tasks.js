// What the playground's models learn: a picture of tiles, each a wave or a sum of waves.
(function (scope) {
  "use strict";

  const BATCH = 256;
  const PIXELS = 24; // of a tile's side
  const { randomOf } = scope.dsmoePlayground;

  // 1.41 sin(a z + phase): a random direction and phase, and a frequency near `frequency`.
  function wave(frequency, random) {
    const turn = 2 * Math.PI * random();
    const size = frequency * (0.75 + 0.5 * random());
    const [a, b, phase] = [size * Math.cos(turn), size * Math.sin(turn), 2 * Math.PI * random()];
    return (u, v) => Math.SQRT2 * Math.sin(a * u + b * v + phase);
  }

  const KINDS = {
    // every tile its own wave
    patches: { side: 4, make: (random, n) => {
      const own = Array.from({ length: n * n }, () => wave(3, random));
      return (i, j) => [own[i * n + j]];
    } },
    // every tile its own wave, and one that all have in common
    common: { side: 4, make: (random, n) => {
      const own = Array.from({ length: n * n }, () => wave(2, random));
      const all = wave(5, random);
      return (i, j) => [own[i * n + j], all];
    } },
    uncommon: { side: 4, make: (random, n) => {
      const own = Array.from({ length: n * n }, () => wave(2, random));
      return (i, j) => [own[i * n + j]];
    } },
    // a wave of the column and one of the row: 16 waves make 64 tiles
    quilt: { side: 8, make: (random, n) => {
      const waves = Array.from({ length: 2 * n }, () => wave(3, random));
      return (i, j) => [waves[i], waves[n + j]];
    } },
    // a wave of the column alone
    columns: { side: 8, make: (random, n) => {
      const waves = Array.from({ length: n }, () => wave(3, random));
      return (i) => [waves[i]];
    } },
  };

  class Task {
    constructor(kind, seed) {
      const { side, make } = KINDS[kind];
      Object.assign(this, { kind, side, n_tags: 2 * side, n_content: 3, random: randomOf(2000 + seed) });
      const wavesOf = make(randomOf(1000 + seed), side);
      this.tags = Array.from({ length: side * side }, (_, tile) => [tile % side, side + Math.floor(tile / side)]);
      this.waves = this.tags.map(([column, row]) => wavesOf(column, row - side));
      const grid = Array.from({ length: PIXELS }, (_, p) => (2 * p + 1) / PIXELS - 1);
      this.pixels = Float64Array.from(grid.flatMap((v) => grid.flatMap((u) => [u, v, 1]))); // (PIXELS^2, 3)
      this.pictures = this.waves.map((_, tile) => this.draw((p) => this.target(tile, this.pixels[3 * p], this.pixels[3 * p + 1])));
    }

    target(tile, u, v) {
      const waves = this.waves[tile];
      let sum = 0;
      for (const one of waves) sum += one(u, v);
      return sum / Math.sqrt(waves.length);
    }

    draw(of) {
      return Float64Array.from({ length: PIXELS ** 2 }, (_, p) => of(p));
    }

    // Fresh tokens: a random place in a random tile. Their kind is the tile, their content the place and a 1.
    batch() {
      const { random } = this;
      const found = { kinds: new Uint8Array(BATCH), x: new Float64Array(3 * BATCH), y: new Float64Array(BATCH) };
      for (let t = 0; t < BATCH; t += 1) {
        const tile = Math.floor(random() * this.tags.length);
        const [u, v] = [2 * random() - 1, 2 * random() - 1];
        found.kinds[t] = tile;
        found.x.set([u, v, 1], 3 * t);
        found.y[t] = this.target(tile, u, v);
      }
      return found;
    }

    // What the model paints on each tile, and each of its experts on any; `error`: share of the picture not explained.
    paint(model) {
      const seen = new Float64Array(3 * model.config.expert_width * Math.max(1, model.config.n_shared_experts));
      const textures = Array.from({ length: model.config.n_routed_experts }, (_, e) =>
        this.draw((p) => model.experts.forward(e, this.pixels, 3 * p, seen)));
      const shared = model.shared && this.draw((p) => model.shared.forward(0, this.pixels, 3 * p, seen));
      let [wrong, all] = [0, 0];
      const tiles = this.pictures.map((picture, tile) => {
        const { ids, gates } = model.choose(tile);
        const painted = shared ? shared.slice() : new Float64Array(PIXELS ** 2);
        ids.forEach((e, k) => {
          for (let p = 0; p < painted.length; p += 1) painted[p] += gates[k] * textures[e][p];
        });
        for (let p = 0; p < painted.length; p += 1) {
          wrong += (painted[p] - picture[p]) ** 2;
          all += picture[p] ** 2;
        }
        return { ids, gates, painted };
      });
      return { tiles, textures, shared, error: wrong / all };
    }
  }

  Object.assign(scope.dsmoePlayground, { Task, PIXELS, KINDS: Object.keys(KINDS) });
})(typeof globalThis === "undefined" ? self : globalThis);
