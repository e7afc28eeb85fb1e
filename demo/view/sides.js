// The JSON of a comparison -> the units of its two sides, and the rows of its table.
//
// A unit is one of the pieces that can be compared, as units.js makes it of tokens, and has also its
// `piece`, null if it is not known what can be compared; its `partner`, the number of the unit with
// the same text on the other side, null if only this side has it; and the `difference`, bits of this
// side less those of the other, null if they cannot be compared.

import { unitsOf } from "./units.js";

export const SIDES = ["a", "b"];
export const otherOf = (name) => (name === "a" ? "b" : "a");

// { a, b }: the units of each side.
export function unitsOfSides(pair) {
  const pieces = {};
  const units = {};
  for (const name of SIDES) {
    pieces[name] = pair.pieces?.filter((piece) => piece[name]);
    const ranges = pieces[name]?.map((piece) => piece[name]) ?? pair[name].pieces;
    units[name] = unitsOf({ ...pair[name], pieces: ranges }, "token");
  }
  for (const name of SIDES) {
    const sign = name === "b" ? 1 : -1;
    const numbers = new Map(pieces[otherOf(name)]?.map((piece, i) => [piece, i]));
    units[name].forEach((unit, i) => {
      unit.piece = pieces[name]?.[i] ?? null;
      unit.partner = numbers.get(unit.piece) ?? null;
      const difference = unit.piece?.difference ?? null;
      unit.difference = difference === null ? null : sign * Number(difference);
    });
  }
  return units;
}

// The KL divergence of A's prediction from B's at the tokens of a unit, bits; null if not known.
export function klOf(unit, pair) {
  if (pair.kl === null || unit.count === 0) return null;
  const known = pair.kl.slice(unit.first, unit.stop).filter((bits) => bits !== null);
  return known.reduce((total, bits) => total + Number(bits), 0);
}

// A row for each piece, in the order of the texts, with the names of the columns first.
export function tableOfPair(pair) {
  const units = unitsOfSides(pair);
  const names = ["start", "end", "text", "bits"];
  const cells = (name, unit) => {
    if (!unit) return names.map(() => null);
    const { start } = pair[name].tokens[unit.first];
    return [start, pair[name].tokens[unit.stop - 1].end, unit.text, unit.bits];
  };
  const unitOf = {};
  for (const name of SIDES) unitOf[name] = new Map(units[name].map((unit) => [unit.piece, unit]));
  const alone = (name) => units[name].map((unit) => ({ [name]: unit }));
  const rows = pair.pieces
    ? pair.pieces.map((piece) => ({ a: unitOf.a.get(piece), b: unitOf.b.get(piece) }))
    : [...alone("a"), ...alone("b")];
  return [
    [...SIDES.flatMap((name) => names.map((column) => `${name}_${column}`)), "difference", "kl"],
    ...rows.map(({ a, b }) => [
      ...cells("a", a),
      ...cells("b", b),
      (a ?? b).piece?.difference,
      klOf(a ?? b, pair),
    ]),
  ];
}
