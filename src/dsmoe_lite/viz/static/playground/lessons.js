// The lessons of the playground: two models, a question, and what to look for. Settings are those of moe.js.
(function (scope) {
  "use strict";

  const { moved, crowd, percent } = scope.dsmoePlayground;
  const BASE = {
    n_routed_experts: 16,
    top_k: 1,
    expert_width: 8,
    n_shared_experts: 0,
    capacity_factor: null,
    balance: 0,
    bias_speed: 0,
  };
  const finer = (m) => ({ n_routed_experts: 8 * m, top_k: m, expert_width: 16 / m, balance: 0.03 });
  const sharing = (n) => ({
    n_routed_experts: 32 - n, top_k: 8 - n, expert_width: 4, n_shared_experts: n, bias_speed: 0.003,
  });
  const hands = ({ points }) => `In the last 200 steps, looked at every 25, tiles changed hands ${moved(points[0])} times in A and ${moved(points[1])} times in B.`;
  const stays = ({ views }) => {
    const { working, all, isCollapsed } = crowd(views[0]);
    return isCollapsed ? `But idle experts stay idle: A still uses ${working} of ${all}. Lifting a limit balances nothing.` : `A now uses ${working} of ${all} experts.`;
  };

  const WORDS = {
    unexplained: "How far a painting is from the picture, as a share of the picture's variance: 0% is a perfect copy, 100% is no better than painting everything in the middle colour. An untrained model can be worse than that.",
    token: "One point of one tile.",
    router: "The part that is told which tile a point is in (its column and row), gives each expert a score for it and picks the best.",
    expert: "A small network that paints. It sees only where in the tile the point is.",
    weight: "A number that training sets.",
    wave: "The pattern of stripes in a tile.",
    "equal share": "The work an expert would do if all did the same: with 16 experts, one sixteenth of the tiles.",
    collapse: "A few experts get all the tiles, and the others never learn. The page says so if a quarter of the experts or more has had no tile for 200 steps.",
    "balance loss": "A penalty for uneven load, added to the painting error that training reduces. The weight says how much it counts.",
    bias: "A number per expert, added to its score when experts are chosen. After each step it rises for experts with too little work and falls for those with too much. Training does not see it: it has no gradient.",
    capacity: "The most tokens an expert accepts in a step, in equal shares. Tokens beyond it are dropped: the expert neither paints them nor learns from them.",
    "top-k": "How many experts the router chooses for a token.",
    unit: "An inner number that an expert computes with (a hidden unit). Units per token measure the work.",
    "shared experts": "Experts that every token uses, without being chosen.",
    seed: "The number from which chance starts: another seed draws other waves and other first weights. The same seed repeats a run exactly.",
  };

  const EVERYWHERE = ["unexplained", "token", "router", "expert", "weight", "unit", "equal share", "seed"];

  // watch: before and while training; look: afterwards, words or a function of the run; tries: changes to models that have
  // learnt; control: the same two models where the reason for the difference is absent.
  const LESSONS = {
    collapse: {
      name: "Collapse",
      hint: "If nothing balances the load, do a few experts get all the tiles?",
      chapter: "06",
      task: "patches",
      steps: 1000,
      a: {},
      b: { balance: 1 },
      question: "Sixteen tiles, sixteen experts, one expert per token. Nothing balances A; B has a balance loss, a penalty for uneven load. Which paints better?",
      watch: "Watch the maps of who paints what: does every expert get a tile?",
      look: "An expert that is chosen early learns early, so it is chosen again. Idle experts never learn, and an expert with several different tiles cannot paint them all well.",
      tries: [
        { name: "Give A the loss now", again: "give A the loss instead", change: [{ balance: 1 }, {}], watch: "Watch A's curve: it gets worse before it gets better.", look: "The loss pushes tiles away from busy experts, to experts that have not learnt them yet. That is why the error rises first." },
        { name: "Give A a bias now", again: "give A a bias instead", change: [{ bias_speed: 0.003 }, {}], watch: "Watch A's curve: it gets worse before it gets better.", look: "The bias lifts idle experts until tiles go to them, although they have not learnt these tiles yet. That is why the error rises first." },
      ],
      words: ["collapse", "balance loss", "bias"],
    },
    capacity: {
      name: "A capacity limit",
      hint: "What happens to tokens for which an expert has no room?",
      chapter: "02",
      task: "patches",
      steps: 1000,
      a: { capacity_factor: 1.25 },
      b: { capacity_factor: 1.25, balance: 1 },
      question: "While training, an expert takes at most 1.25 times an equal share of the tokens; the rest are dropped. Nothing balances A; B has a balance loss. Which paints better?",
      watch: "Watch the white hatching on the maps: that share of a tile's tokens is dropped.",
      look: ({ views }) => `At the end A drops ${Math.round(100 * views[0].dropped)}% of its tokens and B ${Math.round(100 * views[1].dropped)}%. A dropped token teaches no expert anything. (The pictures are painted without the limit.)`,
      tries: [{ name: "Lift both limits now", again: "lift both limits", change: [{ capacity_factor: null }, { capacity_factor: null }], watch: "Watch A's map: do idle experts come back?", look: (run) => `Nothing is dropped any more, so every token teaches an expert. ${stays(run)}` }],
      words: ["capacity", "balance loss"],
    },
    strong: {
      name: "Too much balance",
      hint: "What does it cost to insist on an even load?",
      chapter: "06",
      task: "patches",
      steps: 1000,
      a: { balance: 1 },
      b: { balance: 30 },
      question: "Both have the balance loss, a penalty for uneven load: in A it has weight 1, in B weight 30. Which paints better?",
      watch: "Watch B's map while it trains: how often do tiles change hands?",
      look: (run) => `${hands(run)} B's penalty outweighs its picture: the router moves tiles on before an expert has learnt them.`,
      tries: [{ name: "Lower B's weight to 1", again: "lower B's weight to 1", change: [{}, { balance: 1 }], watch: "Watch B's map: do the tiles settle?", look: (run) => `${hands(run)} With weight 1 the picture counts again, and experts can keep their tiles.` }],
      words: ["balance loss"],
    },
    bias: {
      name: "A bias instead of a loss",
      hint: "Can the load be balanced without a penalty?",
      chapter: "06",
      task: "patches",
      steps: 1000,
      a: { balance: 1 },
      b: { bias_speed: 0.003 },
      question: "A has the balance loss, a penalty for uneven load. B has a bias per expert instead: it rises by 0.003 after each step while the expert has too little work, and falls while it has too much. Which paints better?",
      watch: "Watch both maps: does each expert get one tile?",
      look: "Both even out the load. Which of the two paints better depends on the seed: try ten.",
      tries: [{ name: "Make B's bias too fast: 0.1", again: "make B's bias too fast", change: [{}, { bias_speed: 0.1 }], watch: "Watch B's map: how often do tiles change hands?", look: (run) => `${hands(run)} A router's scores lie between 0 and 1, so steps of 0.1 overturn its choices again and again.` }],
      words: ["balance loss", "bias"],
    },
    finer: {
      name: "Finer experts",
      hint: "A few large experts, or combinations of many small ones?",
      chapter: "04",
      task: "quilt",
      steps: 2000,
      a: finer(1),
      b: finer(4),
      question: "Each of 64 tiles is a wave of its column plus a wave of its row. A uses one of 8 large experts per token; B uses four of 32 experts a quarter the size: as many expert weights, as much work. Which paints better?",
      watch: "Watch B's map: do columns and rows get colours of their own?",
      look: "64 tiles are made of 16 waves. An expert of A has to paint whole tiles, and 8 are not enough. B gives waves of columns and rows to different experts and adds them.",
      control: {
        name: "Control: the column alone decides",
        task: "columns",
        question: "The control: each tile is now only the wave of its column. Eight waves, and nothing to combine. Do finer experts still win by as much?",
        watch: "Watch A: are 8 experts enough for 8 waves?",
        look: ({ views }) => `A leaves ${percent(views[0].error)} unexplained here: its 8 experts are enough for 8 waves. So B's lead in the lesson comes mostly from combining waves.`,
      },
      words: ["wave", "top-k", "balance loss"],
    },
    shared: {
      name: "Shared experts",
      hint: "Should some experts see every token?",
      chapter: "05",
      task: "common",
      steps: 2000,
      a: sharing(0),
      b: sharing(4),
      question: "All 16 tiles have one wave in common, and each has its own. A chooses 8 of 32 experts per token; B always uses 4 shared experts and chooses 4 of 28: as many expert weights, as much work. Which paints better?",
      watch: "Watch the curve, and the card of B's shared experts: what do they paint?",
      look: ({ views: [a, b] }) => `How much of the common wave is in the experts (squared correlation)? In A's ${percent(a.common.routed)} on average; in B ${percent(b.common.shared)} in the shared experts together and ${percent(b.common.routed)} in the others. What the shared experts paint, the others need not learn.`,
      control: {
        name: "Control: no common wave",
        task: "uncommon",
        question: "The control: no wave in common, each tile has only its own. Do shared experts still help?",
        watch: "Watch the curve: is one of them clearly lower?",
        look: "Without a common wave there is nothing for shared experts to take over, and they do not help. Both models paint almost perfectly.",
      },
      words: ["wave", "shared experts", "top-k", "bias"],
    },
  };

  const configOf = (settings) => {
    const config = { ...BASE, ...settings };
    return { ...config, norm_topk_prob: config.top_k > 1 };
  };

  Object.assign(scope.dsmoePlayground, { LESSONS, WORDS, EVERYWHERE, configOf });
})(typeof globalThis === "undefined" ? self : globalThis);
