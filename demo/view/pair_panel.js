// The figures of one unit of a comparison: the lines of its tooltip, and the panel that keeps them.

import { fixed, make, percent, quoted, shortened, whole } from "./make.js";
import { barsOf, MOST_CHARACTERS, NOT_SCORED, panelPlace } from "./panel.js";
import { klOf, otherOf, SIDES } from "./sides.js";

// Unit i of side `name` in a few lines of text; `units` are those of both sides.
export function linesOfPair(name, i, units, pair) {
  const unit = units[name][i];
  const [head, ...lines] = headOf(name, i, units, pair);
  const both = unitsAt(name, i, units);
  const sides = SIDES.filter((side) => both[side]).map(
    (side) => `${side.toUpperCase()}: ${figuresOf(both[side], pair[side]).join(", ")}`,
  );
  return [`${quoted(shortened(unit.text, MOST_CHARACTERS))} ${head}`, ...sides, ...lines];
}

// { a, b }: the unit and its partner, or the one alone.
const unitsAt = (name, i, units) => {
  const unit = units[name][i];
  const other = otherOf(name);
  return { [name]: unit, [other]: unit.partner === null ? null : units[other][unit.partner] };
};

// What both sides have in common.
function headOf(name, i, units, pair) {
  const unit = units[name][i];
  const side = name.toUpperCase();
  if (unit.piece === null) return [`in ${side}`];
  if (unit.partner === null) return [`only in ${side}`];
  if (unit.difference === null) return ["cannot be compared"];
  const kl = klOf(unit, pair);
  return [
    unit.difference === 0
      ? "surprises both equally"
      : `${fixed(Math.abs(unit.difference))} bits ${unit.difference > 0 ? "more" : "less"} in ${side}`,
    ...(kl === null ? [] : [`KL(A‖B) ${fixed(kl)} bits`]),
  ];
}

// Of one side.
function figuresOf(unit, side) {
  if (unit.count === 0) return [NOT_SCORED];
  const figures = [`${fixed(unit.bits)} bits`];
  const [token] = side.tokens.slice(unit.first, unit.stop);
  if (unit.stop - unit.first > 1) return [...figures, `${unit.stop - unit.first} tokens`];
  if (token.rank) figures.push(`rank ${whole(token.rank)}`);
  if (token.top) figures.push(`expected ${quoted(token.top)} most`);
  return figures;
}

export function makePairPanel() {
  const panel = panelPlace();

  function show(name, i, units, pair) {
    const [head, ...lines] = headOf(name, i, units, pair);
    const text = make("bdi", {}, quoted(shortened(units[name][i].text, MOST_CHARACTERS)));
    const common = make("strong", {}, text, ` ${head}`);
    const both = unitsAt(name, i, units);
    const sides = SIDES.filter((side) => both[side]).map((side) =>
      sideOf(side, both[side], pair[side]),
    );
    panel.replaceChildren(
      make("div", { class: "both" }, common, ...lines.map((line) => make("p", {}, line))),
      ...sides,
    );
  }
  return { panel, show };
}

function sideOf(name, unit, side) {
  const figures = figuresOf(unit, side);
  if (unit.count > 0) figures.splice(1, 0, `probability ${percent(unit.bits)}`);
  const hasBars = side.tokens[unit.first].expected || unit.stop - unit.first > 1;
  const bars = hasBars ? barsOf(unit, "token", side) : null;
  return make(
    "div",
    {},
    make("p", {}, make("strong", {}, name.toUpperCase()), ` ${figures.join(", ")}`),
    ...(bars ? [bars] : []),
  );
}
