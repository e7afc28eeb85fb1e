// What a colour can stand for: the value of a unit, its colour, the bins of its histogram.
//
// `colour(value)` -> [class, strength from 0 to 100], of the styles of heatmap.py. `steps` are the
// values of the legend, with `labelOf` each. `edges` begin the bins of the histogram, of which the
// last has no end, and are the thresholds that can be chosen.

import { make } from "./make.js";

const MOST_BITS = 16; // a probability of 1 in 65,536, as in heatmap.py
const MOST_EXCESS = 8;
const MOST_DIFFERENCE = 4; // 16 times as likely, or as unlikely
const RANKS = { 1: "1", 2: "2–10", 11: "11–100", 101: "101–1000", 1001: "1001+" }; // GLTR
const range = (first, stop) => Array.from({ length: stop - first }, (_, i) => first + i);
const strength = (share) => Math.round(100 * Math.min(1, share));
const signed = (value) => `${value < 0 ? "−" : value > 0 ? "+" : ""}${Math.abs(value)}`;

// The colours and labels of bits below and above 0, which end at `most` on either side.
const lessOrMore = (most) => ({
  colour: (bits) => [bits > 0 ? "more" : "less", strength(Math.sqrt(Math.abs(bits) / most))],
  labelOf: (bits) => {
    const label = signed(bits).replace("0.25", "¼").replace("0.5", "½");
    return Math.abs(bits) >= most ? `${label}+` : label;
  },
});

export const MODES = {
  surprisal: {
    name: "surprisal",
    unit: "bits",
    valueOf: (unit) => unit.bits,
    colour: (bits) => ["", strength(Math.sqrt(bits / MOST_BITS))],
    steps: [0, 1, 4, 9, 16],
    edges: range(0, MOST_BITS + 1),
    labelOf: (edge) => (edge === MOST_BITS ? `${edge}+` : `${edge}`),
    atLeast: (edge) => `${edge} bits or more`,
  },
  rank: {
    name: "rank",
    unit: "rank",
    valueOf: (unit) => unit.rank,
    colour: (rank) => ["", 25 * [1, 10, 100, 1000].filter((most) => rank > most).length],
    steps: [1, 2, 11, 101, 1001],
    edges: [1, 2, 11, 101, 1001],
    labelOf: (edge) => RANKS[edge],
    atLeast: (edge) => `rank ${edge.toLocaleString("en")} or worse`,
  },
  excess: {
    name: "surprisal less entropy",
    unit: "bits",
    valueOf: (unit) => (unit.bits === null ? null : unit.bits - unit.entropy),
    ...lessOrMore(MOST_EXCESS),
    steps: [-8, -2, -0.5, 0, 0.5, 2, 8],
    edges: range(-MOST_EXCESS, MOST_EXCESS + 1),
    atLeast: (edge) => `${signed(edge)} bits or more`,
  },
};

// Of two sides, the bits of this one less those of the other; as in heatmap.py.
export const DIFFERENCE = {
  unit: "bits",
  ...lessOrMore(MOST_DIFFERENCE),
  steps: [-4, -1, -0.25, 0, 0.25, 1, 4],
};

// What a mode's legend shows.
export function legendOf(mode) {
  const cells = mode.steps.map((step) => {
    const cell = make("i", {}, mode.labelOf(step));
    paint(cell, mode, step);
    return cell;
  });
  return [`${mode.unit} `, ...cells];
}

// Colour an element by a value; null is not scored.
export function paint(element, mode, value) {
  element.classList.remove("less", "more", "unscored");
  if (value === null || Number.isNaN(value)) {
    element.classList.add("unscored");
    element.style.removeProperty("--s");
    return;
  }
  const [name, share] = mode.colour(value);
  if (name) element.classList.add(name);
  element.style.setProperty("--s", share);
}

// How many of the values each bin has. What is below the first edge is in the first bin.
export function histogramOf(mode, values) {
  const counts = mode.edges.map(() => 0);
  for (const value of values) {
    const bin = mode.edges.findLastIndex((edge) => value >= edge);
    counts[Math.max(0, bin)] += 1;
  }
  return counts;
}

// The number of the edge from which at most a tenth of the values, but at least one, is marked.
export function edgeOfMost(mode, values) {
  const counts = histogramOf(mode, values);
  let edge = counts.length - 1;
  while (edge > 0 && counts[edge] === 0) edge -= 1;
  let marked = counts[edge];
  while (edge > 1 && marked + counts[edge - 1] <= values.length / 10) {
    edge -= 1;
    marked += counts[edge];
  }
  return edge;
}
