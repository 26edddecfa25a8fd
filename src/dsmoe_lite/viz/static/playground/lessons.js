// The lessons of the playground: two models, a question, and what to look for. Settings are those of moe.js.
(function (scope) {
  "use strict";

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

  // chapter: where the question is asked; control: the same two models where the reason for the difference is absent.
  const LESSONS = {
    collapse: {
      name: "Collapse",
      chapter: "06",
      task: "patches",
      steps: 1000,
      a: {},
      b: { balance: 1 },
      question: "Sixteen tiles, sixteen experts, one for each token. A is left alone; B has a balance loss (weight 1). Which paints better?",
      look: "Whoever is chosen early learns early and is chosen again. In A a few experts paint many tiles, none of them well, and others stay idle.",
      tries: [
        ["Give A the loss now", { a: { balance: 1 } }],
        ["Give A a bias now", { a: { bias_speed: 0.003 } }],
      ],
    },
    capacity: {
      name: "Capacity",
      chapter: "02",
      task: "patches",
      steps: 1000,
      a: { capacity_factor: 1.25 },
      b: { capacity_factor: 1.25, balance: 1 },
      question: "An expert now takes at most 1.25 times its share of the tokens; the rest are dropped. A is left alone, B has a balance loss. Which paints better?",
      look: "Watch the dropped tokens: a collapsed router sends most of them to full experts, and a dropped token teaches nothing.",
      tries: [["Lift the limit", { a: { capacity_factor: null }, b: { capacity_factor: null } }]],
    },
    strong: {
      name: "Too much balance",
      chapter: "06",
      task: "patches",
      steps: 1000,
      a: { balance: 1 },
      b: { balance: 30 },
      question: "Both have the balance loss: A with weight 1, B with weight 30. Which paints better?",
      look: "In B the balance loss outweighs the picture, and the load is no more even for it. Watch B's map: how often do tiles change hands?",
      tries: [["Lower B's weight to 1", { b: { balance: 1 } }]],
    },
    bias: {
      name: "A bias, no loss",
      chapter: "06",
      task: "patches",
      steps: 1000,
      a: { balance: 1 },
      b: { bias_speed: 0.003 },
      question: "A has the balance loss. B has no loss at all, only a bias for each expert that moves by 0.003 after each step. Which paints better?",
      look: "The bias evens out the load and adds no gradient. Which of the two paints better changes with the seed: try ten.",
      tries: [["Make B's bias too fast: 0.1", { b: { bias_speed: 0.1 } }]],
    },
    finer: {
      name: "Finer experts",
      chapter: "04",
      task: "quilt",
      steps: 2000,
      a: finer(1),
      b: finer(4),
      question: "Each tile is a wave of its column plus a wave of its row. A has 8 experts and uses one; B cuts each into four, has 32 and uses four: as many expert weights, as much work. Which paints better?",
      look: "64 tiles are made of 16 waves. An expert of A has to paint whole tiles, and 8 do not suffice. B gives columns and rows experts of their own and combines them.",
      control: { name: "Control: the column alone decides", task: "columns" },
    },
    shared: {
      name: "Shared experts",
      chapter: "05",
      task: "common",
      steps: 2000,
      a: sharing(0),
      b: sharing(4),
      question: "All tiles have one wave in common, and each has its own. A chooses 8 of 32 experts; B always uses 4 shared ones and chooses 4 of 28. Which paints better?",
      look: "In A many experts have to learn the common wave, each for its own tiles. In B the shared experts learn it once, for all.",
      control: { name: "Control: no common wave", task: "uncommon" },
    },
  };

  const configOf = (settings) => {
    const config = { ...BASE, ...settings };
    return { ...config, norm_topk_prob: config.top_k > 1 };
  };

  Object.assign(scope.dsmoePlayground, { LESSONS, configOf });
})(typeof globalThis === "undefined" ? self : globalThis);
