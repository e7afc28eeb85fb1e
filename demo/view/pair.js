// The view of a comparison: two texts side by side, each coloured by how much less or more it
// surprises its model than the other does. They scroll together, and a mouse or a key in one shows
// the same place in the other.

import { makeFiles } from "./files.js";
import { make } from "./make.js";
import { DIFFERENCE, legendOf, MODES } from "./modes.js";
import { linesOfPair, makePairPanel } from "./pair_panel.js";
import { scrollTogether } from "./scroll.js";
import { otherOf, SIDES, tableOfPair, unitsOfSides } from "./sides.js";
import { closeTooltipsByEscape, makeText } from "./text.js";

const WAYS = {
  difference: {
    mode: DIFFERENCE,
    valueOf: (unit) => unit.difference,
    hint: "less (blue) or more (red) surprising than on the other side",
  },
  surprisal: { mode: MODES.surprisal, valueOf: (unit) => unit.bits, hint: "" },
};

export function makePairView() {
  let pair, units;
  const ways = Object.keys(WAYS).map((way) => make("option", { value: way }, way));
  const colourBy = make("select", { "aria-label": "Colour by" }, ...ways);
  const steps = make("span", { class: "steps" });
  const hint = make("small");
  const note = make(
    "p",
    {},
    "The tokens of a model do not tell where they stand in the text, so the " +
      "sides cannot be aligned.",
  );
  const { panel, show } = makePairPanel();
  const texts = {};
  const titles = {};
  const panes = SIDES.map((name) => {
    texts[name] = makeText({
      tooltipOf: (i) => linesOfPair(name, i, units, pair),
      onPoint: (i) => point(name, i),
      onPin: (i) => choose(name, i),
    });
    titles[name] = make("bdi");
    const title = make("h2", {}, make("strong", {}, name.toUpperCase()), " ", titles[name]);
    return make("section", {}, title, texts[name].box);
  });
  const article = make(
    "article",
    { class: "surprisal", "aria-label": "Comparison" },
    make("p", { class: "controls" }, make("label", {}, "Colour by ", colourBy), hint, steps),
    note,
    make("div", { class: "panes" }, ...panes),
    panel,
    makeFiles("comparison", () => pair, tableOfPair),
  );
  closeTooltipsByEscape(article);
  const { keep } = scrollTogether(texts.a.box, texts.b.box, () =>
    units.a.flatMap(({ partner }, i) =>
      partner === null ? [] : [[texts.a.span(i), texts.b.span(partner)]],
    ),
  );

  // The JSON of a comparison.
  function draw(newPair) {
    pair = newPair;
    units = unitsOfSides(pair);
    note.hidden = pair.pieces !== null;
    colourBy.firstChild.disabled = pair.pieces === null;
    if (pair.pieces === null) colourBy.value = "surprisal";
    for (const name of SIDES) {
      titles[name].textContent = pair[name].model;
      texts[name].draw(units[name]);
    }
    colour();
    const [name, most] = mostOf(units);
    if (units[name].length) pin(name, most);
  }

  function colour() {
    const { mode, valueOf, hint: text } = WAYS[colourBy.value];
    hint.textContent = text;
    steps.replaceChildren(...legendOf(mode));
    for (const name of SIDES) {
      // No value reaches NaN: nothing is marked.
      texts[name].colour(mode, units[name].map(valueOf), NaN);
      units[name].forEach(({ piece, partner }, i) =>
        texts[name].span(i).classList.toggle("alone", piece !== null && partner === null),
      );
    }
  }

  const partnerOf = (name, i) => units[name][i]?.partner ?? null;

  function point(name, i) {
    texts[name].point(i);
    texts[otherOf(name)].point(partnerOf(name, i));
    // One tooltip at a time: that of the focus, in the other text, would be in the way.
    texts[name].box.classList.remove("quiet");
    texts[otherOf(name)].box.classList.toggle("quiet", i !== null);
  }

  function pin(name, i) {
    texts[name].pin(i);
    texts[otherOf(name)].pin(partnerOf(name, i));
    show(name, i, units, pair);
  }

  function choose(name, i) {
    const [other, partner] = [otherOf(name), partnerOf(name, i)];
    pin(name, i);
    if (partner !== null) keep(texts[other].box, () => texts[other].show(partner));
  }

  colourBy.addEventListener("change", colour);
  return { article, draw };
}

// [side, number] of the unit with the largest difference; without any, the first.
function mostOf(units) {
  const size = ({ difference }) => (difference === null ? -1 : Math.abs(difference));
  const most = units.b.reduce((best, unit, i) => (size(unit) > size(units.b[best]) ? i : best), 0);
  return units.b.length ? ["b", most] : ["a", 0];
}
