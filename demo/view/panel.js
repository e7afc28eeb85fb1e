// The figures of one unit: the lines of its tooltip, and the panel that keeps them.

import { counted, fixed, make, percent, quoted, shortened, visible, whole } from "./make.js";
import { isMean } from "./units.js";

const MOST_BITS = 16; // of a bar
const MOST_BARS = 5; // of the tokens of a unit, as many as likeliest tokens
const MOST_TOKENS = 12; // of a unit that are listed; a language without spaces has long words
export const MOST_CHARACTERS = 60; // of a unit
const MOST_READ = 90; // characters in front of a unit that are shown
export const NOT_SCORED = "not scored: it only conditions what follows";

// A unit in a few lines of text. `score` is what it is a unit of, `kind` which.
export function linesOf(unit, kind, score) {
  const head = quoted(shortened(unit.text, MOST_CHARACTERS));
  if (unit.count === 0) return [head, NOT_SCORED];
  if (isMean(kind)) {
    return [
      head,
      `${counted(unit.count, "token")}, on average ${fixed(unit.bits)} bits`,
      `entropy of the predictions ${fixed(unit.entropy)} bits, median rank ${whole(unit.rank)}`,
    ];
  }
  const tokens = score.tokens.slice(unit.first, unit.stop);
  const lines = [`${head} ${fixed(unit.bits)} bits`];
  const corrected = kind === "word" ? correctedBits(unit, score) : null;
  if (corrected !== null) lines.push(`corrected for where words end: ${fixed(corrected)} bits`);
  if (tokens.length > 1) {
    const names = tokens.slice(0, MOST_TOKENS).map(({ token }) => quoted(token));
    if (tokens.length > MOST_TOKENS) names.push("…");
    return [
      ...lines,
      `probability ${percent(unit.bits)}`,
      `${tokens.length} tokens: ${names.join(" ")}`,
    ];
  }
  lines.push(`probability ${percent(unit.bits)}, rank ${whole(unit.rank)}`);
  lines.push(`entropy of the prediction ${fixed(unit.entropy)} bits`);
  return lines;
}

function correctedBits(unit, score) {
  // What belongs to no word, such as the end of a turn, is in the unit in front of it.
  const word = score.words.findLast(({ first }) => first < unit.stop);
  return word.corrected_bits === null ? null : Number(word.corrected_bits);
}

// The place of the figures, whose changes are announced.
export const panelPlace = () =>
  make("div", {
    class: "panel",
    role: "group",
    "aria-label": "One token",
    "aria-live": "polite",
  });

export function makePanel() {
  const panel = panelPlace();

  // `before` is the text in front of the unit.
  function show(unit, kind, score, before) {
    panel.setAttribute("aria-label", `One ${kind}`);
    const [first, ...lines] = linesOf(unit, kind, score);
    const name = quoted(shortened(unit.text, MOST_CHARACTERS));
    // Apart, because a token may run from the right.
    const head = make("strong", {}, make("bdi", {}, name), first.slice(name.length));
    const read = make("p", {}, "read before it: ", make("bdi", { class: "read" }, lastOf(before)));
    const figures = make("div", {}, head, ...lines.map((line) => make("p", {}, line)), read);
    const bars = barsOf(unit, kind, score);
    panel.replaceChildren(figures, ...(bars ? [bars] : []));
  }
  return { panel, show };
}

// The end of what the model had read, from the beginning of a word.
function lastOf(before) {
  const characters = Array.from(before);
  if (characters.length <= MOST_READ) return visible(before) || "nothing";
  const end = characters.slice(-MOST_READ).join("");
  return `… ${visible(end.includes(" ") ? end.slice(end.indexOf(" ") + 1) : end)}`;
}

// The likeliest tokens in the place of one; of several, how surprising each is.
export function barsOf(unit, kind, score) {
  const tokens = score.tokens.slice(unit.first, unit.stop);
  if (tokens.length === 1) {
    if (tokens[0].expected.length === 0) return null;
    return barList(
      "likeliest tokens",
      tokens[0].expected.map(({ token, bits }) => ({
        width: 100 * 2 ** -Number(bits),
        figure: percent(Number(bits)),
        token,
        isOwn: token === tokens[0].token,
      })),
    );
  }
  const scored = tokens.filter(({ bits }) => bits !== null);
  if (scored.length === 0 || isMean(kind)) return null;
  return barList(
    scored.length > MOST_BARS ? "its first tokens" : "its tokens",
    scored.slice(0, MOST_BARS).map(({ token, bits }) => ({
      width: Math.min(100, (100 * Number(bits)) / MOST_BITS),
      figure: `${fixed(Number(bits), 1)} bits`,
      token,
      isOwn: false,
    })),
  );
}

function barList(label, rows) {
  const bars = rows.map(({ width, figure, token, isOwn }) =>
    make(
      "li",
      { class: isOwn ? "own" : null, style: `--percent: ${width.toFixed(1)}%` },
      make("span", {}, figure),
      make("bdi", {}, quoted(token)),
    ),
  );
  return make("ol", { "aria-label": label }, ...bars);
}
